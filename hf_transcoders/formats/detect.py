"""Which format the files of a folder have."""

from types import ModuleType

from ..errors import TranscoderError
from ..text.printable import printable
from . import saelens
from .folder import Folder


#: Each module has `NAME`, `detect(folder)` and `read(folder, given)`; where it can, `members(folder)` and `write(...)`.
FORMATS: list[ModuleType] = [saelens]


def detect(folder: Folder, own: bool = False) -> ModuleType | None:
    """
    The format of a folder, by its files; `None` where no format has such files.

    Args:
        folder ([`Folder`]): The folder.
        own (`bool`, *optional*, defaults to `False`): Whether it holds a dictionary of this library besides.

    Raises:
        [`TranscoderError`]: the folder has the files of several formats.
    """
    found = [module for module in FORMATS if module.detect(folder)]
    names = [module.NAME for module in found] + (["hf_transcoders"] if own else [])
    if len(names) > 1:
        raise TranscoderError(
            f"{printable(folder.files.place)} holds files of several formats ({', '.join(names)}), which may be different "
            "dictionaries: move those of one of them to a folder of their own."
        )
    return found[0] if found else None
