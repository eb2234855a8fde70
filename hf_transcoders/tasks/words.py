"""Words for prompts. Each task uses those that are single tokens of its tokenizer."""

from ..errors import TranscoderError


MALE_NAMES = (
    "James John Robert Michael David Richard Joseph Thomas Charles Daniel Matthew Anthony Mark Donald Steven Paul Andrew "
    "Kenneth George Joshua Kevin Brian Edward Ronald Timothy Jason Jeffrey Ryan Jacob Gary Nicholas Eric Jonathan Stephen "
    "Larry Justin Scott Brandon Benjamin Samuel Gregory Patrick Peter Adam Henry Simon Martin Oliver Leon Tom"
).split()
FEMALE_NAMES = (
    "Mary Patricia Jennifer Linda Elizabeth Barbara Susan Jessica Sarah Karen Lisa Nancy Betty Sandra Margaret Ashley "
    "Kimberly Emily Donna Michelle Carol Amanda Melissa Deborah Stephanie Rebecca Laura Helen Sharon Cynthia Amy Angela "
    "Anna Ruth Brenda Nicole Katherine Samantha Christine Emma Catherine Rachel Maria Heather Julie Alice Jane Kate Lucy "
    "Victoria"
).split()
# Alternating, so that every split has equally many of both.
NAMES = [name for pair in zip(MALE_NAMES, FEMALE_NAMES, strict=True) for name in pair]

SPLITS = ("train", "validation", "test")


def words_of_split(words: list[str], split: str | None) -> list[str]:
    """
    Select the words of a split: three fifths for training, and a fifth each for validation and test.

    Args:
        words (`list[str]`): All words in a fixed order, which does not depend on the tokenizer.
        split (`str`, *optional*): `"train"`, `"validation"` or `"test"`. By default all words.

    Raises:
        [`TranscoderError`]: there is no such split.
    """
    return [word for index, word in enumerate(words) if in_split(index, split)]


def in_split(index: int, split: str | None) -> bool:
    """Whether the word, or combination of words, at `index` belongs to the split."""
    if split is None:
        return True
    if split not in SPLITS:
        raise TranscoderError(
            f"There is no split '{split}': choose from {', '.join(SPLITS)}, or leave it out for all."
        )
    return split == ("train", "train", "train", "validation", "test")[index % 5]
