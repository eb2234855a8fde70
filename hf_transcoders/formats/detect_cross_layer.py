"""Which format the files of a cross-layer transcoder have, and writing it."""

from pathlib import Path
from types import ModuleType

from ..errors import TranscoderError
from ..text.printable import printable
from . import (
    circuit_tracer_cross_layer,
    crosslayer_transcoder,
    decode_clt,
    gemma_scope_cross_layer,
    llamascopium_cross_layer,
)
from .cross_layer import PlainCrossLayer, with_thresholds
from .folder import Folder


#: Each module has `NAME`, `detect` and `read`.
CROSS_LAYER_FORMATS: list[ModuleType] = [
    circuit_tracer_cross_layer,
    gemma_scope_cross_layer,
    llamascopium_cross_layer,
    crosslayer_transcoder,
    decode_clt,
]

#: What can be written, by the name that the user gives.
CROSS_LAYER_WRITERS: dict[str, ModuleType] = {
    "circuit-tracer": circuit_tracer_cross_layer,
    "gemma-scope": gemma_scope_cross_layer,
}


def detect_cross_layer(folder: Folder) -> ModuleType | None:
    """
    The format of the cross-layer transcoder in a folder; `None` where there is none.

    Raises:
        [`TranscoderError`]: the folder has the files of several formats.
    """
    found = [module for module in CROSS_LAYER_FORMATS if module.detect(folder)]
    if len(found) > 1:
        raise TranscoderError(
            f"{printable(folder.files.place)} holds files of several formats ({', '.join(module.NAME for module in found)}), which may "
            "be different cross-layer transcoders: move those of one of them to a folder of their own."
        )
    return found[0] if found else None


def write_cross_layer(model: PlainCrossLayer, folder: Path, to: str) -> None:
    """Writes a cross-layer transcoder into an empty folder.

    Args:
        model ([`PlainCrossLayer`]): What to write.
        folder (`Path`): The folder.
        to (`str`): One of `CROSS_LAYER_WRITERS`.
    """
    if to not in CROSS_LAYER_WRITERS:
        raise TranscoderError(
            f"There is no format '{printable(to)[:40]}' for cross-layer transcoders: choose from "
            f"{', '.join(CROSS_LAYER_WRITERS)}."
        )
    CROSS_LAYER_WRITERS[to].write(with_thresholds(model), folder)
