"""What format modules see of a folder or repo: names, and files when they are asked for."""

import math
import re
from pathlib import Path
from typing import Any

from ..errors import TranscoderError
from ..text.printable import printable
from ..text.strict_json import read_json, read_yaml


class Folder:
    """
    A folder of a dictionary, local or on the Hub.

    Args:
        files: Finds and downloads files: an object with `find(name)`, `inside(name)` and `place`.
        names (`list[str]`): Paths of the files inside, those of its sub-folders included.
        file (`str`, *optional*): The one weight file that is meant, where the user or a set named it.
        settings (`dict`, *optional*): What the set says of it, where it is a part of one.
    """

    def __init__(self, files, names: list[str], file: str | None = None, settings: dict[str, Any] | None = None):
        self.files, self.names, self.file, self.settings = files, names, file, settings
        self._known = set(names)

    def __contains__(self, name: str) -> bool:
        return name in self._known

    def label(self, name: str) -> str:
        """A file of the folder, for messages."""
        return f"{printable(self.files.place)}/{printable(name)}"

    def find(self, name: str) -> Path:
        """The path of a file on this machine."""
        return self.files.find(name)

    def json(self, name: str) -> dict[str, Any]:
        """A JSON file that holds an object."""
        return read_json(self.find(name))

    def yaml(self, name: str) -> dict[str, Any]:
        """A YAML file that holds a mapping."""
        return read_yaml(self.find(name))

    @property
    def name(self) -> str:
        """Name of the folder itself."""
        return self.files.subfolder.rpartition("/")[2] or Path(self.files.path).absolute().name

    def above(self, name: str) -> dict[str, Any]:
        """A JSON file of the folder above; empty where there is none."""
        parent = self.files.parent()
        path = parent and parent.find(name, optional=True)
        return read_json(path) if path else {}

    def inside(self, name: str) -> "Folder":
        """A sub-folder."""
        names = [path.removeprefix(f"{name}/") for path in self.names if path.startswith(f"{name}/")]
        return Folder(self.files.inside(name), names)

    def one_file(self, path: str) -> "Folder":
        """The folder of one file inside, with that file as the one that is meant."""
        place, _, name = path.rpartition("/")
        if path not in self:
            raise TranscoderError(f"{printable(self.files.place)} lacks {printable(path)}: copy or download it again.")
        folder = self.inside(place) if place else self
        return Folder(folder.files, folder.names, name)

    def on_hub(self, repo: str, path: str, revision: str | None) -> "Folder":
        """The folder of one file in another repo."""
        place, _, name = path.rpartition("/")
        hub = {**self.files.hub, "revision": revision}
        return Folder(type(self.files)(repo, place, **hub), [name], name)

    def matching(self, pattern: str) -> list[str]:
        """Files of the folder itself, in the order of the numbers in their names; only the one that was named, if any."""
        found = [name for name in self.names if "/" not in name and re.fullmatch(pattern, name)]
        if self.file is not None:
            found = [name for name in found if name == self.file]
        return sorted(found, key=natural_order)

    def only(self, pattern: str) -> str:
        """The one file that matches.

        Raises:
            [`TranscoderError`]: there are several, and the user has not said which.
        """
        found = self.matching(pattern)
        if len(found) != 1:
            listed = ", ".join(found[:8]) + (" ..." if len(found) > 8 else "")
            raise TranscoderError(
                f"{printable(self.files.place)} holds {len(found)} dictionaries ({printable(listed)}): name one of them, as in "
                f"'{printable(self.files.place)}/{printable(found[0])}'."
            )
        return found[0]


def natural_order(name: str) -> list:
    """A sorting key by which `layer_10` comes after `layer_9`."""
    return [(int(part) if part.isdecimal() else math.inf, part) for part in re.split(r"(\d+)", name)]
