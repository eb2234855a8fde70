"""Digests of the inputs of a computation, and the differences between two records of them.

A digest is for detecting changes, not for security: it is fast (XXH3 with 128 bits, about the speed of memory) and depends
on values only, not on threads, strides or the device.
"""

import json
from collections.abc import Mapping
from typing import Any

import torch
import xxhash
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .text.printable import printable


_MARK = "xxh3:"
# Settings whose names say enough without the part they belong to; both of their values are named.
_LONGEST = 60


def new_hash():
    """An object with `update(bytes)`, for [`digest_of`]."""
    return xxhash.xxh3_128()


def digest_of(value: Any) -> str:
    """The digest of JSON data, or of the bytes given to a [`new_hash`]."""
    if not hasattr(value, "hexdigest"):
        text = json.dumps(value, sort_keys=True, default=str)
        value = xxhash.xxh3_128(text.encode("utf-8", "surrogatepass"))
    return _MARK + value.hexdigest()


def tensor_digest(tensor: torch.Tensor) -> str:
    """The digest of a tensor's type, shape and bits, on any device."""
    if isinstance(tensor, DTensor):
        tensor = tensor.full_tensor()
    if is_traceable_wrapper_subclass(tensor):
        names, context = tensor.__tensor_flatten__()
        parts = {name: tensor_digest(getattr(tensor, name)) for name in names}
        return digest_of([type(tensor).__qualname__, parts, str(context)])
    hashed = xxhash.xxh3_128(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
    if tensor.numel():
        hashed.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest_of(hashed)


def differences(saved: Any, now: Any, name: str = "") -> list[str]:
    """
    Lists the differences between two records.

    Args:
        saved (`Any`): Earlier JSON data.
        now (`Any`): Current JSON data.
        name (`str`, *optional*): Prefix of every name.

    Returns:
        `list[str]`: differences, such as `learning_rate 0.001 and this run has 0.01`, or `other base_model.weights` of digests.
    """
    if isinstance(saved, Mapping) and isinstance(now, Mapping):
        found = []
        for key in [*saved, *(key for key in now if key not in saved)]:
            # Another version of a library may have an additional field, which is `None` until it is used.
            before, after = saved.get(key), now.get(key)
            found += differences(before, after, printable(f"{name}.{key}" if name else key))
        return found
    if type(saved) is type(now) and saved == now or (_is_number(saved) and _is_number(now) and saved == now):
        return []
    before, after = _shown(saved), _shown(now)
    if saved is None:
        return [f"no {name} and this run has {after}"]
    if now is None:
        return [f"{name} {before} and this run has none"]
    if str(saved).startswith(_MARK) or before == after:
        return [f"other {name}"]
    return [f"{name} {before} and this run has {after}"]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _shown(value: Any) -> str:
    if isinstance(value, Mapping):
        return "other values"
    text = printable(value)
    return text if len(text) <= _LONGEST else text[: _LONGEST - 3] + "..."
