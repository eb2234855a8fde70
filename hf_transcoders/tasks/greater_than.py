"""Greater-than (Hanna et al. 2023): complete a span of years that ends after its start."""

from dataclasses import dataclass

from ..errors import TranscoderError
from .prompt_encoding import PromptEncoder
from .task import Task
from .templates import Row, draw_rows, fill
from .words import words_of_split


_TEMPLATE = "The {noun} lasted from the year {XX1}{YY} to the year {XX2}"
_CENTURIES = [str(century) for century in range(11, 18)]
# Things that last for years.
_NOUNS = (
    "war siege plague famine drought reign rebellion revolt revolution expedition voyage occupation campaign conflict "
    "crisis dispute dynasty empire epidemic exile feud investigation journey marriage migration mission negotiation "
    "operation partnership peace pilgrimage program project protest quarantine quest raid recovery regime renovation "
    "reform residency rivalry sentence strike struggle study survey tour treaty trial truce uprising construction "
    "collaboration friendship apprenticeship boycott blockade alliance"
).split()


def greater_than(
    tokenizer, size: int = 200, seed: int = 0, split: str | None = None, add_bos: bool | None = None
) -> Task:
    """
    Make prompts with a span of years, such as `The war lasted from the year 1732 to the year 17` -> any year above 32,
    against years up to 32. In the corrupted prompt the war begins in 1701, so that every later year is right.

    The digits of the answer depend on how the tokenizer splits years, which is recorded in `settings["variant"]`:

    - `"two_token"`: a year is its century and two digits (` 17`, `32`). All two-digit tokens above are right, and those
      up to it are wrong. Two-digit endings that are never a single token are left out.
    - `"single_digit"`: the last digit is a token (` 1`, `7`, `3`, `2`, or ` 173`, `2`). The prompt ends in `... to the
      year 173`: digits above 2 are right, digits up to 2 are wrong, and the corrupted war begins in 1730.

    Positions: `XX1` and `YY`, the first year without its last token, and its last token; `XX2`, which is `END`. The default
    metric is the probability difference.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): The tokenizer of the language model.
        size (`int`, *optional*, defaults to 200): Number of rows.
        seed (`int`, *optional*, defaults to 0): Seed for the rows.
        split (`str`, *optional*): `"train"`, `"validation"` or `"test"`, which share no nouns. By default all nouns are used.
        add_bos (`bool`, *optional*):
            Whether prompts begin with the beginning-of-sequence token. The default is that of the tokenizer.

    Returns:
        [`Task`]

    Raises:
        [`TranscoderError`]: the tokenizer splits years in another way.

    Source: [How does GPT-2 compute greater-than?](https://arxiv.org/abs/2305.00586).
    """
    encoder = PromptEncoder(tokenizer, add_bos)
    years = year_tokens(encoder)
    nouns = words_of_split(_NOUNS, split)

    def draw(random, index):
        stem, start = random.choice(years.starts)
        words = {"noun": random.choice(nouns), "XX1": stem, "XX2": stem}
        clean = fill(_TEMPLATE, words | {"YY": start})
        corrupted = fill(_TEMPLATE, words | {"YY": years.earliest})
        for prompt in (clean, corrupted):
            del prompt.spans["noun"]
        right, wrong = years.answers(start)
        return Row(clean, corrupted, right, wrong, metadata={"noun": words["noun"], "year": int(stem + start)})

    return Task.from_rows(
        encoder,
        draw_rows(size, seed, draw),
        name="greater-than",
        description="Greater-than: later years against earlier years at the end of a span of years.",
        metric="probability_difference",
        settings={"corruption": "earliest_year", "variant": years.variant, "seed": seed, "split": split},
    )


@dataclass(frozen=True)
class YearTokens:
    """
    The tokens of years.

    Args:
        variant (`str`): `"two_token"` or `"single_digit"`.
        starts (`list[tuple[str, str]]`): First years, each as the digits before the last token and those of the last token.
        earliest (`str`): The ending of the corrupted prompt, with which every later year is right.
        ids (`dict[str, int]`): Ending of a year -> token id.
    """

    variant: str
    starts: list[tuple[str, str]]
    earliest: str
    ids: dict[str, int]

    def answers(self, start: str) -> tuple[list[int], list[int]]:
        """Token ids of the endings above `start`, and of those up to it."""
        later = [id_ for ending, id_ in self.ids.items() if ending > start]
        return later, [id_ for ending, id_ in self.ids.items() if ending <= start]


def year_tokens(encoder: PromptEncoder) -> YearTokens:
    """
    Find the tokens of years after a word.

    Raises:
        [`TranscoderError`]: neither the last two digits nor the last digit is a single token.
    """
    pairs = [f"{number:02d}" for number in range(100)]
    found = _endings(encoder, _CENTURIES, pairs)
    ids = {ending: id_ for (_, ending), id_ in sorted(found.items(), key=lambda item: item[0][1])}
    starts = [(stem, end) for stem, end in found if "02" <= end <= "98" and (stem, "01") in found]
    if len(ids) >= 50 and starts:
        return YearTokens("two_token", starts, "01", ids)
    digits = [str(digit) for digit in range(10)]
    stems = [century + tens for century in _CENTURIES for tens in digits]
    found = _endings(encoder, stems, digits)
    starts = [(stem, end) for stem, end in found if "1" <= end <= "8" and (stem, "0") in found]
    ids = {ending: id_ for (_, ending), id_ in sorted(found.items(), key=lambda item: item[0][1])}
    if len(ids) == 10 and starts:
        return YearTokens("single_digit", starts, "0", ids)
    raise TranscoderError(
        f"The tokenizer {encoder.name} makes a separate token "
        "neither of the last two digits of a year nor of the last one, which greater-than needs: choose another task."
    )


def _endings(encoder, stems, endings):
    """(stem, ending) -> token id of the ending, if it is a single token after the stem."""
    keys = [(stem, ending) for stem in stems for ending in endings]
    ids = encoder.next_tokens([(f"the year {stem}", ending) for stem, ending in keys])
    return {key: id_ for key, id_ in zip(keys, ids, strict=True) if id_ is not None}
