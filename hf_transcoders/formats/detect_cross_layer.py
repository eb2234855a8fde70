"""Which format the files of a cross-layer transcoder have, and writing it."""

from pathlib import Path
from types import ModuleType

from ..errors import TranscoderError
from ..text.printable import printable
from . import circuit_tracer_cross_layer, gemma_scope_cross_layer
from .cross_layer import PlainCrossLayer, with_thresholds
from .folder import Folder


#: The formats by the names that users give. Each module has `NAME`, `detect`, `read` and `write`.
CROSS_LAYER_FORMATS: dict[str, ModuleType] = {
    "circuit-tracer": circuit_tracer_cross_layer,
    "gemma-scope": gemma_scope_cross_layer,
}


def detect_cross_layer(folder: Folder) -> ModuleType | None:
    """The format of the cross-layer transcoder in a folder; `None` where there is none."""
    return next((module for module in CROSS_LAYER_FORMATS.values() if module.detect(folder)), None)


def write_cross_layer(model: PlainCrossLayer, folder: Path, to: str) -> None:
    """Writes a cross-layer transcoder into an empty folder.

    Args:
        model ([`PlainCrossLayer`]): What to write.
        folder (`Path`): The folder.
        to (`str`): One of `CROSS_LAYER_FORMATS`.
    """
    if to not in CROSS_LAYER_FORMATS:
        raise TranscoderError(
            f"There is no format '{printable(to)[:40]}' for cross-layer transcoders: choose from "
            f"{', '.join(CROSS_LAYER_FORMATS)}."
        )
    CROSS_LAYER_FORMATS[to].write(with_thresholds(model), folder)
