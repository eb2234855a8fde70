"""Explain a feature by tables of tokens and of sequences of tokens."""

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from ...data.token_texts import token_texts
from .example_split import ExampleSplit
from .explanation import Explanation


# Number of activations of 0 that each mean is shrunk by.
_SHRINKAGE = 1.0
# Times that a sequence of several tokens must have been seen.
_SEEN = 2
# Sequences that an explanation names.
_NAMED = 10


class NGramExplainer:
    """Mean activation by the last tokens: of the longest sequence that was seen at least twice, or of the token alone.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): Tokenizer that decodes the tokens.
        length (`int`): Number of tokens of the longest sequence: 1 is a table of tokens, 2 of pairs.
        most (`int`, *optional*): Number of single tokens that are kept, those that explain most. By default, all.
        name (`str`, *optional*): Name of the explainer.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, length: int, most: int | None = None, name: str | None = None
    ):
        self.tokenizer, self.length, self.most = tokenizer, length, most
        self.name = name or {1: "token table", 2: "bigram"}.get(length, "n-gram")

    def fit(self, split: ExampleSplit) -> Explanation:
        sums: dict[tuple[int, ...], list[float]] = {}
        for window in split.train:
            for place, activation in enumerate(window.activations):
                for length in range(1, min(self.length, place + 1) + 1):
                    key = tuple(window.tokens[place + 1 - length : place + 1])
                    total = sums.setdefault(key, [0.0, 0.0])
                    total[0] += activation
                    total[1] += 1
        means = {
            key: total / (count + _SHRINKAGE)
            for key, (total, count) in sums.items()
            if (len(key) == 1 and total > 0) or (len(key) > 1 and count >= _SEEN)
        }
        # The squared error that a mean explains.
        weight = {key: means[key] * sums[key][0] for key in means if means[key] > 0}
        ranked = sorted(weight, key=lambda key: (-weight[key], key))
        if self.most is not None:
            kept = set([key for key in ranked if len(key) == 1][: self.most])
            means = {key: mean for key, mean in means.items() if len(key) > 1 or key in kept}
            ranked = [key for key in ranked if len(key) > 1 or key in kept]
        named = [repr("".join(token_texts(self.tokenizer, key))) for key in _without_parts(ranked, means)[:_NAMED]]
        what = "the tokens" if self.length == 1 else "the text"
        text = f"Fires on {what} {', '.join(named)}." if named else "Fires on no token that was seen."
        return Explanation(self.name, text, NGramPredictor(means, self.length))


@dataclass(frozen=True)
class NGramPredictor:
    """Predicted activation of the longest known sequence that ends at each token.

    Args:
        means (`dict[tuple[int, ...], float]`): Sequence of token ids -> activation on its last token.
        length (`int`): Number of tokens of the longest sequence.
    """

    means: dict[tuple[int, ...], float]
    length: int

    def __call__(self, tokens: Sequence[int]) -> list[float]:
        found = []
        for place in range(len(tokens)):
            value = 0.0
            for length in range(min(self.length, place + 1), 0, -1):
                key = tuple(tokens[place + 1 - length : place + 1])
                if key in self.means:
                    value = self.means[key]
                    break
            found.append(value)
        return found


def _without_parts(ranked, means):
    """Sequences of which no shorter end is named with a mean that is as large."""
    named, ends = [], {}
    for key in ranked:
        shorter = [ends[key[i:]] for i in range(1, len(key)) if key[i:] in ends]
        if all(means[key] > 1.5 * value for value in shorter):
            named.append(key)
            ends[key] = means[key]
    return named
