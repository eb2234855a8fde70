"""Explain a feature by a rule about classes of tokens."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from transformers import PreTrainedTokenizerBase

from ...data.token_texts import token_texts
from .example_split import ExampleSplit
from .explanation import Explanation


_QUOTES, _OPEN, _CLOSE = '"“”«»', "([{", ")]}"
# Endings and beginnings of words that are tried, of the tokens with the largest activations.
_AFFIXES = 24


def _classes_of_text(text: str) -> dict[str, bool]:
    word = text.strip()
    letters = word.isalpha()
    return {
        "begins with a space": text.startswith(" "),
        "continues a word": letters and not text.startswith((" ", "\n", "\t")),
        "capitalized": letters and word[0].isupper() and not (len(word) > 1 and word.isupper()),
        "in capitals": letters and len(word) > 1 and word.isupper(),
        "lower case": letters and word.islower(),
        "digits": bool(word) and word.isdigit(),
        "with a digit": any(character.isdigit() for character in word),
        "punctuation": bool(word) and not any(character.isalnum() for character in word),
        "line break": "\n" in text,
        "blank": bool(text) and not word,
        "not ASCII": not text.isascii(),
        "one character": len(word) == 1,
        "a long piece of at least 6 letters": letters and len(word) >= 6,
        "an opening bracket": any(character in _OPEN for character in word),
        "a closing bracket": any(character in _CLOSE for character in word),
        "a quotation mark": any(character in _QUOTES for character in word),
        "the end of a sentence": word[-1:] in (".", "!", "?"),
        "a comma": "," in word,
    }


class TokenClasses:
    """The classes that tokens of windows belong to.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): Tokenizer that decodes the tokens.
    """

    OF_TOKEN = tuple(_classes_of_text("a"))
    OF_CONTEXT = (
        *(f"after {name}" for name in ("the end of a sentence", "a comma", "an opening bracket", "a quotation mark",
                                       "digits", "capitalized", "line break", "punctuation")),
        "the first token",
        "inside brackets",
        "inside quotation marks",
    )  # fmt: skip

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer
        self._texts: dict[int, str] = {}
        self._classes: dict[int, np.ndarray] = {}

    def texts(self, tokens: Sequence[int]) -> list[str]:
        """Texts of tokens."""
        new = [token for token in dict.fromkeys(tokens) if token not in self._texts]
        if new:
            self._texts.update(zip(new, token_texts(self.tokenizer, new), strict=True))
        return [self._texts[token] for token in tokens]

    def of(self, tokens: Sequence[int], affixes: Sequence[tuple[str, str]] = ()) -> np.ndarray:
        """Which classes each token of a window belongs to, `(tokens, classes)`: those of [`names`]."""
        texts = self.texts(tokens)
        for token, text in zip(tokens, texts, strict=True):
            if token not in self._classes:
                self._classes[token] = np.array(list(_classes_of_text(text).values()))
        own = np.stack([self._classes[token] for token in tokens])
        before = np.roll(own, 1, axis=0)
        before[0] = False
        after = before[:, [self.OF_TOKEN.index(name.removeprefix("after ")) for name in self.OF_CONTEXT[:8]]]
        first = np.zeros((len(tokens), 1), dtype=bool)
        first[0] = True
        inside = np.array(_inside(texts)).reshape(len(tokens), 2)
        words = [text.strip().lower() for text in texts]
        ends = [
            [word.endswith(affix) if side == "ending in" else word.startswith(affix) for side, affix in affixes]
            for word in words
        ]
        return np.concatenate(
            [own, after, first, inside, np.array(ends, dtype=bool).reshape(len(tokens), len(affixes))], axis=1
        )

    def names(self, affixes: Sequence[tuple[str, str]] = ()) -> list[str]:
        """Names of the classes."""
        return [*self.OF_TOKEN, *self.OF_CONTEXT, *(f"{side} {affix!r}" for side, affix in affixes)]


def _inside(texts):
    """Whether each token is inside brackets, and inside quotation marks, as far as the window shows."""
    depth, quoted, found = 0, False, []
    for text in texts:
        found.append((depth > 0, quoted))
        for character in text:
            depth += (character in _OPEN) - (character in _CLOSE and depth > 0)
            if character in _QUOTES:
                quoted = not quoted
    return found


class TokenClassExplainer:
    """A rule of one or two classes of tokens, or of their opposites: the one whose two means explain most of the activations.

    Args:
        classes ([`TokenClasses`]): The classes, which features share.
    """

    name = "token classes"

    def __init__(self, classes: TokenClasses):
        self.classes = classes

    def fit(self, split: ExampleSplit) -> Explanation:
        activations = np.concatenate([np.asarray(window.activations) for window in split.train])
        affixes = self._affixes(split, activations)
        member = np.concatenate([self.classes.of(window.tokens, affixes) for window in split.train])
        names = self.classes.names(affixes)
        both = np.concatenate([member, ~member], axis=1).astype(np.float64)
        counts, sums = both.T @ both, both.T @ (both * activations[:, None])
        total, every = activations.sum(), len(activations)
        with np.errstate(divide="ignore", invalid="ignore"):
            explained = sums**2 / counts + (total - sums) ** 2 / (every - counts) - total**2 / every
            rises = sums / counts > (total - sums) / (every - counts)
        explained = np.where(rises & np.isfinite(explained), explained, -1.0)
        # A second class must explain noticeably more.
        single = np.diag(explained)
        first, second = np.unravel_index(np.argmax(explained), explained.shape)
        if explained[first, second] < 1.05 * single.max():
            first = second = int(np.argmax(single))
        if explained[first, second] <= 0:
            return Explanation(self.name, "No class of tokens was found.", lambda tokens: [0.0] * len(tokens))
        rule = tuple(sorted({int(first), int(second)}))
        inside = sums[first, second] / counts[first, second]
        outside = (total - sums[first, second]) / (every - counts[first, second])
        words = " and ".join(names[i] if i < len(names) else f"not {names[i - len(names)]}" for i in rule)
        predict = RulePredictor(self.classes, affixes, rule, float(inside), float(outside), len(names))
        return Explanation(self.name, f"Fires on tokens that are: {words}.", predict)

    def _affixes(self, split, activations):
        largest = activations.max(initial=0.0)
        counts: dict[tuple[str, str], int] = {}
        for window in split.train:
            words = (text.strip().lower() for text in self.classes.texts(window.tokens))
            for word, activation in zip(words, window.activations, strict=True):
                if activation > 0.3 * largest and word.isalpha() and len(word) > 2:
                    for length in range(2, min(4, len(word) - 1) + 1):
                        for affix in (("ending in", word[-length:]), ("beginning with", word[:length])):
                            counts[affix] = counts.get(affix, 0) + 1
        return sorted(counts, key=lambda affix: (-counts[affix], affix))[:_AFFIXES]


@dataclass(frozen=True)
class RulePredictor:
    """One activation where a rule of classes holds, and another elsewhere.

    Args:
        classes ([`TokenClasses`]): The classes.
        affixes (`Sequence[tuple[str, str]]`): Endings and beginnings that are classes besides.
        rule (`tuple[int, ...]`): Numbers of the classes that must hold; numbers from `count` on are their opposites.
        inside, outside (`float`): The activations.
        count (`int`): Number of classes.
    """

    classes: TokenClasses = field(repr=False)
    affixes: Sequence[tuple[str, str]]
    rule: tuple[int, ...]
    inside: float
    outside: float
    count: int

    def __call__(self, tokens: Sequence[int]) -> list[float]:
        member = self.classes.of(tokens, self.affixes)
        holds = np.ones(len(tokens), dtype=bool)
        for number in self.rule:
            holds &= member[:, number] if number < self.count else ~member[:, number - self.count]
        return np.where(holds, self.inside, self.outside).tolist()
