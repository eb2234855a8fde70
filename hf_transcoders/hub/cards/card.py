"""A model card as a file: saved beside what it is about, and known again later unless somebody has edited it."""

import contextlib
import hashlib
import os
from dataclasses import dataclass, field
from pathlib import Path

from ...errors import TranscoderError
from ...files import is_inside, write_text
from ...models.saved_files import CONFIG_NAME
from ...models.transcoder_set import INDEX_NAME
from ...text import logging
from ...text.printable import printable
from ...text.strict_json import read_json
from ..public import hidden_names


logger = logging.get_logger(__name__)

README = "README.md"
#: Folder of the card's pictures, beside it.
ASSETS = "assets"

# A card ends in one of these and a hash of what stands before it: a card with another hash was edited since.
_WRITTEN = "\n<!-- Written by hf_transcoders; a card that was edited is not overwritten. sha256: "
_PUSHED = "\n<!-- Pushed by hf_transcoders; an edit on the Hub is not overwritten. sha256: "


@dataclass
class TranscoderCard:
    """
    A model card and its pictures.

    Args:
        text (`str`): README.md as a whole, with its metadata.
        files (`dict[str, str]`): Path beside README.md -> content, of the pictures that the text shows.
    """

    text: str
    files: dict[str, str] = field(default_factory=dict)

    def save(self, folder: str | os.PathLike) -> Path:
        """
        Writes the card and its pictures into a folder. A README.md that somebody wrote or edited there stays as it is; the
        card then goes into README.generated.md.

        Returns:
            `Path`: the card's file.
        """
        for name, content in self.files.items():
            write_text(Path(folder, name), content)
        path = Path(folder, README)
        if _written_by_hand(folder) is not None:
            path = path.with_name("README.generated.md")
            logger.warning(
                f"{README} in {folder} was edited by hand and stays as it is: the new model card is in {path.name}."
            )
        return write_text(path, self.text)


def generated(text: str, files: dict[str, str]) -> TranscoderCard:
    """A card of ours, which [`is_generated`] knows again."""
    return TranscoderCard(_sealed(text, _WRITTEN), files)


def is_generated(text: str) -> bool:
    """Whether a README.md is a card of ours that nobody has edited since."""
    return _unsealed(text, _WRITTEN) is not None


def own_card(folder: str | os.PathLike) -> TranscoderCard | None:
    """The card that somebody wrote or edited in a folder, to be pushed in place of ours; `None` if there is none."""
    text = _written_by_hand(folder)
    if text is None:
        return None
    pushed = _unsealed(text, _PUSHED)
    text = text if pushed is None else pushed
    # It may have begun as ours, which names the folder of the base model on this machine.
    for name, public in _hidden_names(folder).items():
        text = text.replace(name, public)
    # Sealed as ours are, so that the next push can tell whether it was edited on the Hub.
    return TranscoderCard(_sealed(text, _PUSHED))


def _hidden_names(folder: str | os.PathLike) -> dict[str, str]:
    """The paths of base models that the dictionaries in a folder name -> what others may see of them."""
    names = []
    for path in (Path(folder, CONFIG_NAME), Path(folder, INDEX_NAME)):
        with contextlib.suppress(TranscoderError):
            names.append(read_json(path).get("base_model_name_or_path"))
    return hidden_names(names)


def is_unedited(text: str) -> bool:
    """Whether a card on the Hub is as a push has left it."""
    return is_generated(text) or _unsealed(text, _PUSHED) is not None


def _written_by_hand(folder: str | os.PathLike) -> str | None:
    """The README.md of a folder, unless there is none or it is ours."""
    path = Path(folder, README)
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else None
    if text is not None and not is_inside(path, folder):
        raise TranscoderError(
            f"{printable(path)} is a link to a file outside of its folder, which is not read: put the file itself there, or "
            "remove the link."
        )
    return None if text is None or is_generated(text) else text


def _sealed(text: str, words: str) -> str:
    return f"{text}{words}{hashlib.sha256(text.encode()).hexdigest()} -->\n"


def _unsealed(card: str, words: str) -> str | None:
    """What stands before the seal; `None` where it has none with these words, or was edited."""
    text, found, _ = card.rpartition(words)
    return text if found and card == _sealed(text, words) else None
