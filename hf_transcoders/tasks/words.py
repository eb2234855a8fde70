"""Words that prompts are made of. Each task keeps those that the tokenizer at hand writes as one token."""

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
# Taken in turn, so that every split has as many of the one as of the other.
NAMES = [name for pair in zip(MALE_NAMES, FEMALE_NAMES, strict=True) for name in pair]

SPLITS = ("train", "validation", "test")


def words_of_split(words: list[str], split: str | None) -> list[str]:
    """
    The words that a split may use: three fifths for training, a fifth each for validation and test.

    Args:
        words (`list[str]`): All words, in the order of the source, whatever the tokenizer.
        split (`str`, *optional*): `"train"`, `"validation"` or `"test"`; all words if left out.

    Raises:
        [`TranscoderError`]: There is no such split.
    """
    return [word for index, word in enumerate(words) if in_split(index, split)]


def in_split(index: int, split: str | None) -> bool:
    """Whether the `index`-th word, or combination of words, belongs to the split."""
    if split is None:
        return True
    if split not in SPLITS:
        raise TranscoderError(
            f"There is no split '{split}': choose from {', '.join(SPLITS)}, or leave it out for all."
        )
    return split == ("train", "train", "train", "validation", "test")[index % 5]
