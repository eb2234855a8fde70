"""Open the weight files of other libraries, and read one tensor at a time without running code from the file."""

import gzip
import io
import math
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open

from ..errors import TranscoderError
from ..mapped_memory import release_pages
from ..text.printable import printable


_SAFETENSORS_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_NUMPY_DTYPES = {"float64": torch.float64, "float32": torch.float32, "float16": torch.float16}
# Deflate cannot compress further than 1032 to 1, so a member that claims more lies about its size.
_DEFLATE_RATIO = 1032
# Weights are close to random numbers; what unpacks to more than this many times its size is not weights.
_GZIP_RATIO = 64


@dataclass(frozen=True)
class LazyTensor:
    """
    A tensor in a file, read when it is asked for.

    Args:
        shape (`tuple[int, ...]`): Shape of the tensor that `read` returns.
        dtype (`torch.dtype`): Type of its numbers.
        read (`Callable[[], torch.Tensor]`): Reads the tensor.
        read_entry (`Callable[[int], torch.Tensor]`, *optional*): Reads one entry of the first dimension, without the others.
        is_mapped (`bool`, *optional*, defaults to `False`): Whether `read` returns memory that is mapped from the file.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], torch.Tensor]
    read_entry: Callable[[int], torch.Tensor] | None = None
    is_mapped: bool = False

    @property
    def T(self) -> "LazyTensor":
        """The transpose of a matrix, in memory of its own."""
        return LazyTensor(self.shape[::-1], self.dtype, self._reading(lambda matrix: matrix.T.contiguous()))

    def at(self, index: int) -> "LazyTensor":
        """One entry of the first dimension."""
        read = self.read_entry or (lambda number: self.read()[number])
        return LazyTensor(self.shape[1:], self.dtype, lambda: read(index))

    def then(self, change: Callable[[torch.Tensor], torch.Tensor], dtype: torch.dtype | None = None) -> "LazyTensor":
        """The result of a change that keeps the shape, and the type of the numbers unless one is given."""
        dtype = dtype or self.dtype
        return LazyTensor(self.shape, dtype, self._reading(lambda tensor: change(tensor).to(dtype)))

    def _reading(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[], torch.Tensor]:
        """Reads the tensor and changes it, without keeping both a mapped tensor and its copy in memory."""

        def read():
            tensor = self.read()
            changed = change(tensor)
            if self.is_mapped and changed.untyped_storage().data_ptr() != tensor.untyped_storage().data_ptr():
                release_pages(tensor)
            return changed

        return read


def stacked(parts: list[LazyTensor]) -> LazyTensor:
    """Tensors of one shape as the entries of a new second dimension."""
    first = parts[0]
    return LazyTensor(
        (first.shape[0], len(parts), *first.shape[1:]),
        first.dtype,
        lambda: torch.stack([part.read() for part in parts], dim=1),
    )


def filled(value: float, *shape: int) -> LazyTensor:
    """A tensor with one value everywhere, which no file holds."""
    return LazyTensor(shape, torch.float32, lambda: torch.full(shape, value))


class Weights:
    """
    The tensors of one opened file by name.

    Args:
        path (`str` or `os.PathLike`): The file, for messages.
        tensors (`dict[str, LazyTensor]`): Name -> tensor.
        extra (`dict[str, Any]`, *optional*): What the file holds besides tensors.
        version (`str`, *optional*): Version of the library that wrote the file, where the file says it.
    """

    def __init__(
        self,
        path,
        tensors: dict[str, LazyTensor],
        extra: dict[str, Any] | None = None,
        version: str | None = None,
    ):
        self.path, self.tensors, self.extra, self.version = str(path), tensors, extra or {}, version

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def __getitem__(self, name: str) -> LazyTensor:
        if name not in self.tensors:
            raise TranscoderError(
                f"{printable(self.path)} lacks the tensor {printable(name)}: copy or download the dictionary again."
            )
        return self.tensors[name]

    def matrix(self, name: str) -> tuple[int, int]:
        """The shape of a tensor that must be a matrix."""
        shape = self[name].shape
        if len(shape) != 2 or 0 in shape:
            raise TranscoderError(
                f"{name} in {printable(self.path)} has shape {shape}, but must be a matrix: copy or download the dictionary "
                "again."
            )
        return shape

    def take(self, name: str, *shape: int) -> LazyTensor:
        """A tensor that must have this shape."""
        tensor = self[name]
        if tensor.shape != shape:
            raise TranscoderError(
                f"{name} in {printable(self.path)} has shape {tensor.shape} where the other tensors ask for {shape}: copy or "
                "download the dictionary again."
            )
        return tensor

    def refuse_newer(self, newest: int, library: str) -> None:
        """Refuses a file of a version of its library that is not known yet."""
        major = (self.version or "0").split(".")[0]
        if not major.isdecimal() or int(major) > newest:
            raise TranscoderError(
                f"{printable(self.path)} was written by {library} {printable(self.version)[:20]}, and files up to version {newest} are "
                "known: upgrade hf_transcoders with `pip install -U hf_transcoders`."
            )

    def expect_only(self, *names: str) -> None:
        """Refuses tensors for which the format has no use."""
        if further := sorted(self.tensors.keys() - set(names)):
            raise TranscoderError(
                f"{printable(self.path)} holds {printable(', '.join(further))[:200]}, which its format does not know: the "
                "dictionary would compute something else, so it is not loaded."
            )


def open_weights(path: Path, classes: tuple[tuple[type, str], ...] = ()) -> Weights:
    """
    Opens a file of tensors.

    Args:
        path (`Path`): A `.safetensors`, `.npz`, `.pt`, `.pth`, `.pkl` or gzip-compressed file.
        classes (`tuple[tuple[type, str], ...]`, *optional*):
            Plain classes that a torch file may name, each with the name it has there.

    Raises:
        [`TranscoderError`]: the file is damaged, or holds something other than numbers.
    """
    reader = {".safetensors": _open_safetensors, ".npz": _open_npz}.get(path.suffix)
    try:
        return reader(path) if reader else _open_torch(path, classes)
    except TranscoderError:
        raise
    # Readers fail in many ways on a damaged file, and torch's unpickler lets all of them through.
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise TranscoderError(
            f"{printable(path)} cannot be read ({printable(reason)[:200].removesuffix('.')}): the file is damaged, cut short or "
            "holds more than numbers, so copy or download it again."
        ) from error


def _open_safetensors(path: Path) -> Weights:
    opened = safe_open(path, framework="pt")
    tensors = {}
    for name in opened.keys():
        header = opened.get_slice(name)
        dtype = _SAFETENSORS_DTYPES.get(header.get_dtype())
        if dtype is not None:
            tensors[name] = LazyTensor(
                tuple(header.get_shape()),
                dtype,
                lambda name=name: opened.get_tensor(name),
                lambda number, name=name: opened.get_slice(name)[number],
                is_mapped=True,
            )
    other = {name: None for name in opened.keys() if name not in tensors}
    return Weights(path, tensors, other, (opened.metadata() or {}).get("version"))


def _open_npz(path: Path) -> Weights:
    archive = zipfile.ZipFile(path)
    tensors = {}
    for member in archive.infolist():
        with archive.open(member) as file:
            version = np.lib.format.read_magic(file)
            read_header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
            shape, by_column, dtype = read_header[version](file)
            start = file.tell()
        if dtype.name not in _NUMPY_DTYPES:
            raise TranscoderError(
                f"{printable(path)} holds {printable(member.filename)} of type {printable(dtype)}, which no weight has: get "
                "the file from where it was published."
            )
        size = math.prod(shape) * dtype.itemsize
        if member.file_size != start + size or size > _DEFLATE_RATIO * (member.compress_size + 1):
            raise TranscoderError(
                f"{printable(member.filename)} in {printable(path)} has another size than its header says: copy or download "
                "the file again."
            )
        read = _npy_reader(path, member.filename, shape, by_column, dtype, start)
        tensors[member.filename.removesuffix(".npy")] = LazyTensor(tuple(shape), _NUMPY_DTYPES[dtype.name], read)
    return Weights(path, tensors)


def _npy_reader(path, member, shape, by_column, dtype, start):
    def read():
        content = np.empty(math.prod(shape), dtype)
        try:
            with zipfile.ZipFile(path) as archive, archive.open(member) as file:
                file.seek(start)
                filled = file.readinto(memoryview(content).cast("B"))  # pyright: ignore[reportAttributeAccessIssue]
        except (zipfile.BadZipFile, OSError) as error:
            raise TranscoderError(f"{printable(path)} is damaged: copy or download it again.") from error
        if filled != content.nbytes:
            raise TranscoderError(f"{printable(path)} is cut short: copy or download it again.")
        array = content.reshape(shape, order="F" if by_column else "C")
        return torch.from_numpy(np.ascontiguousarray(array.astype(dtype.newbyteorder("="), copy=False)))

    return read


def _open_torch(path: Path, classes) -> Weights:
    source, mapped = path, True
    with open(path, "rb") as file:
        start = file.read(2)
    if start == b"\x1f\x8b":
        source, mapped = io.BytesIO(_unzip(path)), False
    elif start == b"PK":
        _refuse_packed(path)
    else:
        mapped = False  # Files of torch before 1.6 are no archives.
    with torch.serialization.safe_globals(list(classes)):
        content = torch.load(source, map_location="cpu", weights_only=True, mmap=mapped or None)
    tensors, extra = {}, {}
    for name, value in _flat(content).items():
        if isinstance(value, torch.Tensor) and value.is_floating_point() and value.layout is torch.strided:
            tensors[name] = LazyTensor(
                tuple(value.shape), value.dtype, lambda value=value: value.detach().contiguous()
            )
        else:
            extra[name] = value
    version = extra.get("version")
    return Weights(path, tensors, extra, version if isinstance(version, str) else None)


def _refuse_packed(path: Path) -> None:
    """Refuses an archive that unpacks to more than its size: torch stores its entries as they are."""
    with zipfile.ZipFile(path) as archive:
        size = sum(entry.file_size for entry in archive.infolist())
    if size > path.stat().st_size:
        raise TranscoderError(
            f"{printable(path)} unpacks to {size} bytes, more than the size of the file, which torch does not write: get it from where it "
            "was published."
        )


def _flat(content: object) -> dict[str, Any]:
    """What a torch file holds, with the state dict in it, by one of the names that libraries give it, at the top."""
    if not isinstance(content, dict):
        return {"content": content}
    values = {str(name): value for name, value in content.items()}
    for name in ("state_dict", "sae"):
        inner = values.pop(name, None)
        if isinstance(inner, dict):
            values |= {str(key): value for key, value in inner.items()}
    return values


def _unzip(path: Path) -> bytes:
    limit = _GZIP_RATIO * path.stat().st_size
    with gzip.open(path) as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise TranscoderError(
            f"{printable(path)} unpacks to more than {_GZIP_RATIO} times its size, which weights do not: get it from where it "
            "was published."
        )
    return content
