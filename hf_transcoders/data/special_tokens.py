"""From a text to the tokens that a model reads, with the special tokens at its beginning once."""

from collections.abc import Sequence


def encode_text(tokenizer, text: str) -> list[int]:
    """
    Token ids of a text, special tokens included, as its tokenizer gives them. A text that begins with them already, as a
    chat template makes it, is left as it is: these are the ids of `apply_chat_template(tokenize=True)`.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): Tokenizer of the base model.
        text (`str`): The text.

    Returns:
        `list[int]`
    """
    whole = list(tokenizer(text).input_ids)
    # The beginning-of-sequence token, and in some models more. Words may be repeated too, but these are the text's own.
    for length in range(1, len(whole) // 2 + 1):
        if whole[:length] == whole[length : 2 * length]:
            plain = list(tokenizer(text, add_special_tokens=False).input_ids)
            if whole[length : length + len(plain)] == plain:
                return plain
    return whole


def with_beginning(ids: Sequence[int], beginning: Sequence[int]) -> list[int]:
    """Token ids behind those that a text begins with, unless they begin with these already."""
    ids, beginning = list(ids), list(beginning)
    return ids if ids[: len(beginning)] == beginning else beginning + ids
