"""Encode texts without duplicating the special tokens at their beginning."""

from collections.abc import Sequence


def encode_text(tokenizer, text: str) -> list[int]:
    """
    Encodes a text with the special tokens of its tokenizer. If the text already begins with them, as from a chat template,
    they are not added again: the ids are those of `apply_chat_template(tokenize=True)`.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): Tokenizer of the base model.
        text (`str`): Text to encode.

    Returns:
        `list[int]`
    """
    whole = list(tokenizer(text).input_ids)
    # The beginning-of-sequence token and, for some models, more. Repeated words are part of the text.
    for length in range(1, len(whole) // 2 + 1):
        if whole[:length] == whole[length : 2 * length]:
            plain = list(tokenizer(text, add_special_tokens=False).input_ids)
            if whole[length : length + len(plain)] == plain:
                return plain
    return whole


def with_beginning(ids: Sequence[int], beginning: Sequence[int]) -> list[int]:
    """Token ids prefixed with the special tokens, unless they already begin with them."""
    ids, beginning = list(ids), list(beginning)
    return ids if ids[: len(beginning)] == beginning else beginning + ids
