"""Greater-than (Hanna et al. 2023): a span of years that must end after it began."""

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
    `The war lasted from the year 1732 to the year 17` -> any year above 32, against those up to 32; in the corrupted
    prompt the war begins in 1701, so that every later year is right.

    Which digits are asked for follows from how the tokenizer writes years; `settings["variant"]` says it:

    - `"two_token"`: a year is its century and the rest (` 17`, `32`). Right are all two-digit tokens above, wrong those up
      to it. Two-digit endings that are never a token of their own belong to neither.
    - `"single_digit"`: the last digit is a token (` 1`, `7`, `3`, `2`, or ` 173`, `2`). The prompt ends in `... to the
      year 173`: right are digits above 2, wrong those up to 2, and the corrupted war begins in 1730.

    Positions: `XX1` and `YY`, the first year up to its last token and that token; `XX2`, which is `END`. The usual metric
    is the probability difference.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): Tokenizer of the base model.
        size (`int`, *optional*, defaults to 200): Rows.
        seed (`int`, *optional*, defaults to 0): The same seed gives the same rows.
        split (`str`, *optional*): `"train"`, `"validation"` or `"test"`, which share no nouns; all if left out.
        add_bos (`bool`, *optional*):
            Whether prompts begin with the beginning-of-sequence token; by default as the tokenizer does.

    Returns:
        [`Task`]

    Raises:
        [`TranscoderError`]: The tokenizer splits years in neither way.

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
        description="Greater-than: later years against earlier ones at the end of a span of years.",
        metric="probability_difference",
        settings={"corruption": "earliest_year", "variant": years.variant, "seed": seed, "split": split},
    )


@dataclass(frozen=True)
class YearTokens:
    """
    How a tokenizer writes years.

    Args:
        variant (`str`): `"two_token"` or `"single_digit"`.
        starts (`list[tuple[str, str]]`): Years to begin with: all digits but those of the last token, and those.
        earliest (`str`): The ending that makes every later one right.
        ids (`dict[str, int]`): Ending -> token id.
    """

    variant: str
    starts: list[tuple[str, str]]
    earliest: str
    ids: dict[str, int]

    def answers(self, start: str) -> tuple[list[int], list[int]]:
        """Ids of the endings above `start`, and of those up to it."""
        later = [id_ for ending, id_ in self.ids.items() if ending > start]
        return later, [id_ for ending, id_ in self.ids.items() if ending <= start]


def year_tokens(encoder: PromptEncoder) -> YearTokens:
    """
    Finds out how a tokenizer writes years behind a word.

    Raises:
        [`TranscoderError`]: Neither the last two digits nor the last one is a token of its own.
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
        f"The tokenizer {encoder.name} makes a token of its own "
        "neither of the last two digits of a year nor of the last one, which greater-than needs: choose another task."
    )


def _endings(encoder, stems, endings):
    """(stem, ending) -> id of the ending, where it is one token behind the stem."""
    keys = [(stem, ending) for stem in stems for ending in endings]
    ids = encoder.next_tokens([(f"the year {stem}", ending) for stem, ending in keys])
    return {key: id_ for key, id_ in zip(keys, ids, strict=True) if id_ is not None}
