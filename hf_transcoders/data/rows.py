"""Read the rows of a token dataset, without padding."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from ..errors import TranscoderError


def read_row(row: Mapping, what: str = "A row") -> np.ndarray:
    """
    Reads the tokens of a row that its `attention_mask` does not mark as padding.

    In training, evaluation and circuits, the library uses exactly these tokens: padding on the left, on the right or in
    between is removed, so that results do not depend on it. Without `attention_mask` every token counts. Documents that were
    packed into one row are one text: their ends are not known, and later ones attend to earlier ones. Other columns, such as
    `labels`, are not read.

    Args:
        row (`Mapping`):
            `input_ids` and, with padding, `attention_mask`, as lists, arrays or tensors of shape `(tokens,)`, or `(1, tokens)`
            as returned by a tokenizer.
        what (`str`, *optional*, defaults to `"A row"`): Name of the row in errors.

    Returns:
        `np.ndarray` of shape `(tokens,)`: token ids in int64, empty if the row has none.

    Raises:
        [`TranscoderError`]: the row has no `input_ids`, these are not integers, or the mask has another shape.
    """
    if not isinstance(row, Mapping) or row.get("input_ids") is None:
        has = f"it has {', '.join(map(str, row))}" if isinstance(row, Mapping) else f"it is a {type(row).__name__}"
        raise TranscoderError(f"{what} has no column `input_ids` ({has}): tokenize the text first.")
    ids = _integers(row["input_ids"])
    if ids is None or ids.ndim != 1:
        shape = "" if ids is None else f" of shape {ids.shape}"
        raise TranscoderError(
            f"The `input_ids` of a row are whole numbers in a list, but {_lower(what)} has others{shape}."
        )
    mask = row.get("attention_mask")
    if mask is None:
        return ids
    mask = _array(mask)
    if mask.shape != ids.shape:
        raise TranscoderError(
            f"{what} has {len(ids)} tokens and an `attention_mask` of shape {mask.shape}: give one number for each token."
        )
    kept = mask == 1
    if not (kept | (mask == 0)).all():
        raise TranscoderError(
            f"The `attention_mask` of {_lower(what)} has {mask[~(kept | (mask == 0))][0]} in it: give 1 for each token and 0 "
            "for padding."
        )
    return ids if kept.all() else ids[kept]


def token_rows(dataset: Iterable[Mapping] | Mapping) -> Sequence | Iterable:
    """
    Returns the rows of a dataset in any form.

    Args:
        dataset (`Iterable[Mapping]` or `Mapping`):
            Dataset in any format, list of rows, or output of a tokenizer for several texts.

    Returns:
        The rows as mappings: the dataset itself if possible.

    Raises:
        [`TranscoderError`]: the argument is a mapping of several datasets, such as a `DatasetDict`.
    """
    refuse_splits(dataset)
    if isinstance(dataset, Mapping):
        return split_rows(dataset)
    form = getattr(dataset, "format", None)
    if isinstance(form, dict) and form.get("type") not in (None, "custom"):
        # Rows of lists. A custom transform of the user is kept.
        return dataset.with_format(None)  # pyright: ignore[reportAttributeAccessIssue]
    return dataset


def split_rows(batch: Mapping) -> list[dict[str, Any]]:
    """The rows in the output of a tokenizer for one text or several."""
    columns = {name: batch[name] for name in ("input_ids", "attention_mask") if batch.get(name) is not None}
    ids = columns["input_ids"]
    if len(ids) and np.ndim(ids[0]) == 0:
        return [columns]
    return [{name: values[number] for name, values in columns.items()} for number in range(len(ids))]


def is_several(dataset: Any) -> bool:
    """Whether the argument is several datasets by name, such as a `DatasetDict`."""
    return isinstance(dataset, Mapping) and "input_ids" not in dataset


def one_dataset(dataset: Any) -> Any:
    """A dataset, or the first of several."""
    return next(iter(dataset.values()), None) if is_several(dataset) else dataset


def refuse_splits(dataset: Any) -> None:
    """Raises a [`TranscoderError`] if several datasets were given instead of one."""
    if is_several(dataset):
        names = list(map(str, dataset))
        raise TranscoderError(
            f"This is not one dataset but a {type(dataset).__name__} of {', '.join(names) or 'none'}: choose one, such as "
            f"`dataset[{names[0] if names else 'train'!r}]`."
        )


def _integers(values) -> np.ndarray | None:
    array = _array(values)
    if array.size == 0:
        return array.astype(np.int64)
    return array.astype(np.int64, copy=False) if array.dtype.kind in "iu" else None


def _array(values) -> np.ndarray:
    """Numbers in any form as an array; the output of a tokenizer for one text has an additional dimension."""
    try:
        array = np.asarray(values.cpu() if hasattr(values, "cpu") else values)
    except ValueError:  # Lists of different lengths.
        return np.array([None])
    return array[0] if array.ndim == 2 and len(array) == 1 else array


def _lower(what: str) -> str:
    return what[:1].lower() + what[1:]
