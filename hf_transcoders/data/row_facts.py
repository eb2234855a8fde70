"""Count and digest the tokens of a dataset in one pass."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..fingerprint import digest_of, new_hash
from .rows import read_row


# Number of rows that are read at a time: a few megabytes.
_ROWS = 4096


@dataclass(frozen=True)
class RowFacts:
    """
    Counts and digest of the rows of a dataset.

    Args:
        rows (`int`): Number of rows.
        tokens (`int`): Number of tokens, without padding.
        kept (`int`): Number of tokens without the first ones of each row and without special tokens.
        digest (`str`): Digest of all tokens in order, which does not depend on storage and padding.
    """

    rows: int
    tokens: int
    kept: int
    digest: str


class RowDigest:
    """A digest of rows that are added in portions of any size."""

    def __init__(self):
        self._ids, self._lengths = new_hash(), new_hash()

    def update(self, ids: np.ndarray, lengths: np.ndarray) -> None:
        """
        Adds rows.

        Args:
            ids (`np.ndarray` of shape `(tokens,)`): Concatenated tokens of the rows.
            lengths (`np.ndarray` of shape `(rows,)`): Number of tokens of each row.
        """
        self._ids.update(np.ascontiguousarray(ids, dtype="<i8"))
        self._lengths.update(np.ascontiguousarray(lengths, dtype="<i8"))

    def watch(self, rows: Iterable[Mapping]) -> Iterator[Mapping]:
        """Yields rows, each of which is first added to the digest."""
        for row in rows:
            ids = read_row(row)
            self.update(ids, np.array([len(ids)]))
            yield row

    def digest(self) -> str:
        """The digest of the rows added so far."""
        return digest_of([self._ids.hexdigest(), self._lengths.hexdigest()])


def is_sized(dataset: Any) -> bool:
    """Whether rows can be accessed by number."""
    return hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")


def scan_rows(dataset: Sequence[Mapping], skip_first: int = 0, special_token_ids: Iterable[int] = ()) -> RowFacts:
    """
    Counts and digests all rows of a dataset.

    Args:
        dataset (`Sequence` of rows with `input_ids` and, where they are padded, `attention_mask`):
            [`~datasets.Dataset`] or list of rows.
        skip_first (`int`, *optional*, defaults to 0): Number of first tokens of each row that are not in `kept`.
        special_token_ids (`Iterable[int]`, *optional*): Tokens that are not in `kept`.

    Returns:
        [`RowFacts`]
    """
    special = np.array(sorted(set(special_token_ids)), dtype=np.int64)
    digest, tokens, kept = RowDigest(), 0, 0
    for ids, lengths in _portions(dataset):
        digest.update(ids, lengths)
        tokens += len(ids)
        kept += int(np.maximum(lengths - skip_first, 0).sum())
        if special.size:
            found = np.flatnonzero(np.isin(ids, special))
            ends = np.cumsum(lengths)
            begin = ends - lengths
            place = found - begin[np.searchsorted(ends, found, side="right")]
            kept -= int((place >= skip_first).sum())
    return RowFacts(len(dataset), tokens, kept, digest.digest())


def dataset_digest(dataset: Any) -> Any:
    """The digest of rows with `input_ids` or `text`, or one for each of several datasets; `None` for a stream."""
    if isinstance(dataset, Mapping):
        return {str(name): dataset_digest(part) for name, part in dataset.items()}
    if not is_sized(dataset):
        return None
    if not len(dataset) or "input_ids" in dataset[0]:
        return scan_rows(dataset).digest
    hashed = new_hash()
    for text in dataset["text"] if hasattr(dataset, "column_names") else (row["text"] for row in dataset):
        content = str(text).encode("utf-8", "surrogatepass")
        hashed.update(len(content).to_bytes(8, "little") + content)
    return digest_of(hashed)


def _portions(dataset) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Tokens and lengths of a few thousand rows at a time."""
    for start in range(0, len(dataset), _ROWS):
        stop = min(start + _ROWS, len(dataset))
        yield _from_arrow(dataset, start, stop) or _from_rows(dataset[number] for number in range(start, stop))


def _from_rows(rows: Iterable[Mapping]) -> tuple[np.ndarray, np.ndarray]:
    arrays = [read_row(row) for row in rows]
    return np.concatenate(arrays), np.array([len(array) for array in arrays])


def _from_arrow(dataset, start: int, stop: int) -> tuple[np.ndarray, np.ndarray] | None:
    """Tokens and lengths from the columns of a [`~datasets.Dataset`]; `None` if these are not plain lists of numbers."""
    form = getattr(dataset, "format", None)
    if not hasattr(dataset, "with_format") or not isinstance(form, dict) or form.get("type") == "custom":
        return None
    columns = [name for name in ("input_ids", "attention_mask") if name in form.get("columns", ())]
    if "input_ids" not in columns:
        return None
    table = dataset.with_format("arrow", columns=columns)[start:stop]
    parts = [_flat(table.column(name).combine_chunks()) for name in columns]
    if any(part is None for part in parts):
        return None
    (ids, lengths), *masks = parts  # pyright: ignore[reportGeneralTypeIssues]
    for mask, mask_lengths in masks:  # pyright: ignore[reportGeneralTypeIssues]
        if not np.array_equal(mask_lengths, lengths):
            return None
        real = mask != 0
        if not real.all():
            ends = np.concatenate([[0], np.cumsum(real)])[np.cumsum(lengths)]
            ids, lengths = ids[real], np.diff(ends, prepend=0)
    return ids, lengths


def _flat(column) -> tuple[np.ndarray, np.ndarray] | None:
    """Concatenated values and lengths of a column of lists of integers."""
    import pyarrow as pa

    kinds = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
    if not any(kind(column.type) for kind in kinds) or column.null_count:
        return None
    values = column.flatten()
    if not pa.types.is_integer(values.type) or values.null_count:
        return None
    lengths = column.value_lengths() if hasattr(column, "value_lengths") else None
    if lengths is None:
        lengths = np.full(len(column), column.type.list_size)
    return values.to_numpy(zero_copy_only=False), np.asarray(lengths, dtype=np.int64)
