"""Encode prompts, find words among their tokens, and find words that are single tokens."""

from bisect import bisect_left
from collections.abc import Iterable, Sequence

from ..data.packing import bos_token_ids
from ..data.special_tokens import with_beginning
from ..errors import TranscoderError


class PromptEncoder:
    """
    Encodes prompts for a language model, finds words among their tokens, and finds words that are single tokens.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            The tokenizer of the language model.
        add_bos (`bool`, *optional*):
            Whether a prompt begins with the beginning-of-sequence token. The default is that of the tokenizer. A prompt
            that already begins with it, such as one from a chat template, gets no second one.
    """

    def __init__(self, tokenizer, add_bos: bool | None = None):
        self.tokenizer = tokenizer
        self.prefix = bos_token_ids(tokenizer, add_bos)
        self.name = tokenizer.name_or_path or type(tokenizer).__name__

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Encode texts, with the beginning-of-sequence token if prompts begin with it."""
        if not texts:
            return []
        encoded = self.tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False)
        return [with_beginning(ids, self.prefix) for ids in encoded["input_ids"]]

    def locate(self, texts: Sequence[str], spans: Sequence[dict[str, tuple[int, int]]]) -> list[dict[str, int]]:
        """
        Find the last token of each named span of text.

        Args:
            texts (`Sequence[str]`): The prompts.
            spans (`Sequence[dict[str, tuple[int, int]]]`):
                The spans of each prompt: name -> begin and end, in characters.

        Returns:
            `list[dict[str, int]]`: for each prompt, name of the span -> index of its last token.

        Raises:
            [`TranscoderError`]: no token ends with a span, or its tokens depend on the text after it.
        """
        if not any(spans):
            return [{} for _ in texts]
        find = self._locate_by_offsets if self.tokenizer.is_fast else self._locate_by_steps
        return find(list(texts), spans)

    def _locate_by_offsets(self, texts, spans):
        encoded = self.tokenizer(
            texts, add_special_tokens=False, return_attention_mask=False, return_offsets_mapping=True
        )
        located = []
        for text, ids, offsets, named in zip(
            texts, encoded["input_ids"], encoded["offset_mapping"], spans, strict=True
        ):
            starts = [start for start, _ in offsets]
            added = len(with_beginning(ids, self.prefix)) - len(ids)
            positions = {}
            for name, (begin, end) in named.items():
                # A token may begin with the space before its word, but not end after the word.
                token = bisect_left(starts, end) - 1
                if token < 0 or not begin < offsets[token][1] <= end:
                    raise TranscoderError(_no_token(name, text[begin:end]))
                positions[name] = token + added
            located.append(positions)
        return located

    def _locate_by_steps(self, texts, spans):
        """For tokenizers without offsets: count the tokens of the text up to the end of the word."""
        located = []
        for text, ids, named in zip(texts, self.encode(texts), spans, strict=True):
            ends = self.encode([text[:end] for _, end in named.values()])
            positions = {}
            for (name, (begin, end)), head in zip(named.items(), ends, strict=True):
                if len(head) == len(self.prefix) or ids[: len(head)] != head:
                    raise TranscoderError(_no_token(name, text[begin:end]))
                positions[name] = len(head) - 1
            located.append(positions)
        return located

    def next_tokens(self, pairs: Sequence[tuple[str, str]]) -> list[int | None]:
        """
        Find the token of each continuation of a text.

        Args:
            pairs (`Sequence[tuple[str, str]]`): Pairs of text and continuation.

        Returns:
            `list[int | None]`: token ids, `None` for a continuation that is not exactly one known token, or that changes
            the tokens before it.
        """
        # Many pairs share a text.
        texts = list(dict.fromkeys(text for text, _ in pairs))
        before = dict(zip(texts, self.encode(texts), strict=True))
        after = self.encode([text + more for text, more in pairs])
        unknown = self.tokenizer.unk_token_id
        return [
            long[-1] if len(long) == len(short) + 1 and long[:-1] == short and long[-1] != unknown else None
            for short, long in zip((before[text] for text, _ in pairs), after, strict=True)
        ]

    def single_tokens(self, words: Iterable[str], context: str = "the", space: str = " ") -> dict[str, int]:
        """
        Find the words that are single tokens in running text.

        Args:
            words (`Iterable[str]`): Words without a leading space.
            context (`str`, *optional*, defaults to `"the"`): The text before each word.
            space (`str`, *optional*, defaults to `" "`): The separator between the text and the word.

        Returns:
            `dict[str, int]`: word -> token id.
        """
        words = list(words)
        ids = self.next_tokens([(context, space + word) for word in words])
        return {word: id_ for word, id_ in zip(words, ids, strict=True) if id_ is not None}

    def require(self, words: Iterable[str], needed: int, what: str, **context) -> dict[str, int]:
        """Call [`~PromptEncoder.single_tokens`], and refuse the tokenizer if fewer than `needed` words are single tokens."""
        words = list(words)
        found = self.single_tokens(words, **context)
        if len(found) < needed:
            raise TranscoderError(
                f"The tokenizer {self.name} writes {len(found)} of "
                f"{len(words)} {what} as single tokens, but the task needs {needed}: choose another task or model."
            )
        return found


def _no_token(name, text):
    return (
        f"The position {name} ({text!r}) does not end at the end of a token in the prompt: "
        "choose words that the tokenizer does not merge with their neighbors."
    )
