"""Which format the files of a folder have."""

from types import ModuleType

from ..errors import TranscoderError
from ..text.printable import printable
from . import (
    circuit_tracer,
    dictionary_learning,
    gemma_scope,
    llama_scope,
    llamascopium,
    saelens,
    saelens_writer,
    sparsify,
    torch_file,
)
from .folder import Folder, natural_order


#: Each module has `NAME`, `detect(folder)` and `read(folder, given)`.
FORMATS: list[ModuleType] = [
    saelens,
    sparsify,
    circuit_tracer,
    gemma_scope,
    dictionary_learning,
    llama_scope,
    llamascopium,
]

#: What can be written, by the name that the user gives.
WRITERS: dict[str, ModuleType] = {
    "saelens": saelens_writer,
    "sparsify": sparsify,
    "circuit-tracer": circuit_tracer,
    "dictionary-learning": dictionary_learning,
}


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
    if not found and not own:
        found = [torch_file] if torch_file.detect(folder) else []
    return found[0] if found else None


def members(folder: Folder) -> dict[str, tuple[ModuleType, Folder]]:
    """
    The dictionaries of other libraries in a folder, by name: those that a set lists, or else one in each sub-folder.

    Args:
        folder ([`Folder`]): The folder.
    """
    listed = next((module for module in (circuit_tracer, torch_file) if module.detect(folder)), None)
    if listed is not None:
        return {name: (listed, member) for name, member in listed.members(folder).items()}
    places = {path.rpartition("/")[0] for path in folder.names} - {""}
    found = {}
    for place in sorted(places, key=natural_order):
        inside = folder.inside(place)
        module = detect(inside)
        if module is not None:
            found[place.replace("/", ".")] = (module, inside)
    return found
