"""Save nested states of optimizers, schedulers and random number generators as tensors and JSON, without pickle.

A state consists of dicts, lists, tuples, tensors, NumPy arrays, numbers, strings, booleans and `None`. Its tensors are saved
in a safetensors file by number, and the rest as JSON in the header of that file. Loading restores the same bits and types.
"""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ..errors import TranscoderError
from ..text.strict_json import parse_json


_HEADER = "state"


def save_state(state: Any, path: Path) -> None:
    """Write a nested state.

    Args:
        state (`Any`): State, see above.
        path (`Path`): Path of the safetensors file.

    Raises:
        [`TranscoderError`]: the state holds something that is not data.
    """
    packer = _Packer()
    header = json.dumps(packer.pack(state), allow_nan=False)
    save_file(_on_cpu(packer.tensors), path, metadata={_HEADER: header})


def check_state(state: Any) -> None:
    """Raise the [`TranscoderError`] of [`save_state`] for a state that it cannot write, without copying tensors."""
    _Packer().pack(state)


def load_state(path: Path) -> Any:
    """Read a nested state, with tensors on the CPU.

    Args:
        path (`Path`): Path of a file written by [`save_state`].

    Raises:
        [`TranscoderError`]: the file is damaged, or was not written by [`save_state`].
    """
    try:
        with safe_open(path, "pt") as file:
            header = (file.metadata() or {}).get(_HEADER)
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (OSError, SafetensorError) as error:
        raise TranscoderError(f"{path} cannot be read ({error}): take another checkpoint.") from error
    if header is None:
        raise TranscoderError(f"{path} holds tensors but no state: take another checkpoint.")
    try:
        return _unpack(parse_json(header, str(path), list), tensors)
    except (KeyError, IndexError, TypeError, ValueError, OverflowError, RecursionError) as error:
        if isinstance(error, TranscoderError):
            raise
        raise TranscoderError(f"{path} holds a state that is damaged: take another checkpoint.") from error


class _Packer:
    """Convert a state to JSON lists whose first entry is the type, so that types and values cannot be confused."""

    def __init__(self):
        self.tensors: dict[str, torch.Tensor] = {}
        # Kept alive, so that no other object gets the same id.
        self._seen: dict[int, tuple[str, Any]] = {}

    def pack(self, value: Any) -> list:
        if isinstance(value, np.generic):
            value = value.item()
        if value is None or isinstance(value, bool | int | str):
            return ["value", value]
        if isinstance(value, float):
            # JSON has no literals for numbers that are not finite.
            return ["value", value] if math.isfinite(value) else ["float", str(value)]
        if isinstance(value, dict):
            return ["dict", [[self.pack(key), self.pack(part)] for key, part in value.items()]]
        if type(value) in (list, tuple):
            return [type(value).__name__, [self.pack(part) for part in value]]
        if isinstance(value, torch.Tensor) and not is_traceable_wrapper_subclass(value):
            return ["tensor", self._number(value)]
        if isinstance(value, np.ndarray) and value.dtype.kind in "biuf":
            return ["array", self._number(value)]
        kind = type(value)
        raise TranscoderError(
            f"A checkpoint cannot hold a {kind.__module__}.{kind.__qualname__}, only tensors, numbers and text."
        )

    def _number(self, value: torch.Tensor | np.ndarray) -> str:
        if id(value) not in self._seen:
            number = str(len(self._seen))
            self._seen[id(value)] = (number, value)
            tensor = value.detach() if isinstance(value, torch.Tensor) else torch.from_numpy(value)
            self.tensors[number] = tensor
        return self._seen[id(value)][0]


def _on_cpu(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Contiguous tensors, with copies of those that share memory, which safetensors refuses."""
    storages: set[int] = set()
    result = {}
    for name, tensor in tensors.items():
        tensor = tensor.cpu().contiguous()
        storage = tensor.untyped_storage()
        if storage.data_ptr() in storages or storage.nbytes() != tensor.nbytes:
            tensor = tensor.clone()
        storages.add(tensor.untyped_storage().data_ptr())
        result[name] = tensor
    return result


def _unpack(entry: list, tensors: dict[str, torch.Tensor]) -> Any:
    kind, content = entry
    if kind == "value" and (content is None or isinstance(content, bool | int | float | str)):
        return content
    if kind == "float":
        return float(content)
    if kind == "dict":
        return {_unpack(key, tensors): _unpack(part, tensors) for key, part in content}
    if kind in ("list", "tuple"):
        return (list if kind == "list" else tuple)(_unpack(part, tensors) for part in content)
    if kind == "tensor":
        return tensors[content]
    if kind == "array":
        return tensors[content].numpy()
    raise ValueError(kind)
