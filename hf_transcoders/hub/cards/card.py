"""Save a model card, and recognize it later as generated or edited."""

import contextlib
import hashlib
import os
from dataclasses import dataclass, field
from pathlib import Path

from ...errors import TranscoderError
from ...files import is_inside, write_text
from ...models.saved_files import CONFIG_NAME
from ...models.set_index import INDEX_NAME
from ...text import logging
from ...text.printable import printable
from ...text.strict_json import read_json
from ..public import hidden_names


logger = logging.get_logger(__name__)

README = "README.md"
#: Folder of the card's pictures, next to the card.
ASSETS = "assets"

# A card ends in one of these and a hash of the text before it: a card with another hash was edited.
_WRITTEN = "\n<!-- Written by hf_transcoders; a card that was edited is not overwritten. sha256: "
_PUSHED = "\n<!-- Pushed by hf_transcoders; an edit on the Hub is not overwritten. sha256: "


@dataclass
class TranscoderCard:
    """
    A model card and its pictures.

    Args:
        text (`str`): README.md as a whole, with its metadata.
        files (`dict[str, str]`): Path relative to README.md -> content, for each picture in the text.
    """

    text: str
    files: dict[str, str] = field(default_factory=dict)

    def save(self, folder: str | os.PathLike) -> Path:
        """
        Writes the card and its pictures into a folder. A README.md that was written or edited by hand is kept, and the card is
        written to README.generated.md.

        Returns:
            `Path`: file of the card.
        """
        for name, content in self.files.items():
            write_text(Path(folder, name), content)
        path = Path(folder, README)
        if _written_by_hand(folder) is not None:
            path = path.with_name("README.generated.md")
            logger.warning(
                f"{README} in {folder} was edited by hand and is kept: the new model card is in {path.name}."
            )
        return write_text(path, self.text)


def generated(text: str, files: dict[str, str]) -> TranscoderCard:
    """A generated card, which [`is_generated`] recognizes."""
    return TranscoderCard(_sealed(text, _WRITTEN), files)


def is_generated(text: str) -> bool:
    """Whether a README.md is a generated card that was not edited."""
    return _unsealed(text, _WRITTEN) is not None


def own_card(folder: str | os.PathLike) -> TranscoderCard | None:
    """The card in a folder that was written or edited by hand, to be pushed instead of a generated one; `None` if there is none."""
    text = _written_by_hand(folder)
    if text is None:
        return None
    pushed = _unsealed(text, _PUSHED)
    text = text if pushed is None else pushed
    # It may have begun as a generated card, which names the local folder of the base model.
    for name, public in _hidden_names(folder).items():
        text = text.replace(name, public)
    # Sealed like a generated card, so that the next push can tell whether it was edited on the Hub.
    return TranscoderCard(_sealed(text, _PUSHED))


def _hidden_names(folder: str | os.PathLike) -> dict[str, str]:
    """Local paths of base models in the configurations of a folder -> their public names."""
    names = []
    for path in (Path(folder, CONFIG_NAME), Path(folder, INDEX_NAME)):
        with contextlib.suppress(TranscoderError):
            names.append(read_json(path).get("base_model_name_or_path"))
    return hidden_names(names)


def is_unedited(text: str) -> bool:
    """Whether a card on the Hub was not edited after its push."""
    return is_generated(text) or _unsealed(text, _PUSHED) is not None


def _written_by_hand(folder: str | os.PathLike) -> str | None:
    """The README.md of a folder, unless there is none or it is a generated card."""
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
    """The text before the seal; `None` if the card has no seal with these words, or was edited."""
    text, found, _ = card.rpartition(words)
    return text if found and card == _sealed(text, words) else None
