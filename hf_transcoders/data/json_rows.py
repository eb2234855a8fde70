"""Read rows of JSON and JSON Lines files one by one.

Arrow's reader crashes the process if a block of a file begins with `null`.
"""

import itertools
import os
from collections.abc import Iterator, Sequence

from ..errors import TranscoderError
from ..text.printable import printable
from ..text.strict_json import json_items, parse_json
from .text_files import open_text


# Number of rows from which the columns are inferred.
_LOOKED_AT = 1000
# Blanks, and the byte order mark.
_BLANK = b" \t\r\n\xef\xbb\xbf"


def json_rows(path: str | os.PathLike) -> Iterator[tuple[str, dict]]:
    """
    Reads the objects of a file: one per line, the items of a list, or a single object. Strings in a list become a `text`.

    Args:
        path (`str` or `os.PathLike`): Path of the file, compressed or not.

    Returns:
        `Iterator[tuple[str, dict]]`: position of each object, for messages, and the object.

    Raises:
        [`TranscoderError`]: the file is not JSON, or has other values. Objects before the error are yielded first.
    """
    with open_text(path) as file:
        lines = enumerate(file, start=1)
        number, first = next(((number, line) for number, line in lines if line.strip(_BLANK)), (0, b""))
        if first.lstrip(_BLANK).startswith(b"["):
            for number, item in enumerate(json_items(first + file.read(), str(path)), start=1):
                where = f"Item {number} of {path}"
                yield where, {"text": item} if isinstance(item, str) else _object(item, where)
            return
        if not first:
            return
        where = f"Line {number} of {path}"
        try:
            yield where, _object(parse_json(first, where, object), where)
        except TranscoderError as error:
            # One object over several lines begins like a damaged line.
            rest = file.read() if first.lstrip(_BLANK).startswith(b"{") else b""
            try:
                yield str(path), parse_json(first + rest, str(path))
            except TranscoderError:
                raise error from None
            return
        for number, line in lines:
            if not line.isspace():
                where = f"Line {number} of {path}"
                yield where, _object(parse_json(line, where, object), where)


def _object(value, where):
    if isinstance(value, dict):
        return value
    raise TranscoderError(
        f"{printable(where)} is not an object: give a file of objects, one a line or in one list, such as "
        '{"text": "..."}.'
    )


def json_columns(files: Sequence[str]) -> dict[str, bool]:
    """Infer the columns of files from their first rows, and whether each has text.

    Raises:
        [`TranscoderError`]: a row cannot be read.
    """
    values: dict[str, list] = {}
    rows = itertools.chain.from_iterable(map(json_rows, files))
    for _, row in itertools.islice(rows, _LOOKED_AT):
        for name, value in row.items():
            values.setdefault(name, []).append(value)
    return {
        name: any(isinstance(value, str) for value in column)
        and all(value is None or isinstance(value, str) for value in column)
        for name, column in values.items()
    }


def json_dataset(files: Sequence[str], column: str, streaming: bool, split: str):
    """
    Loads one column of JSON files as a dataset: as `text`, or `input_ids` with its own name.

    Args:
        files (`Sequence[str]`): Paths of the files.
        column (`str`): Name of the column.
        streaming (`bool`): Whether to read rows when they are needed.
        split (`str`): Name of the split.

    Returns:
        [`~datasets.Dataset`] or [`~datasets.IterableDataset`]
    """
    from datasets import Dataset, Features, IterableDataset, List, NamedSplit, Value

    tokenized = column == "input_ids"
    features = Features({"input_ids": List(Value("int64"))} if tokenized else {"text": Value("string")})
    # Size and time are part of the key under which rows are cached.
    stamps = [(os.stat(file).st_size, os.stat(file).st_mtime_ns) for file in files]
    arguments = {"files": list(files), "column": column, "stamps": stamps}
    made = IterableDataset if streaming else Dataset
    return made.from_generator(_column_rows, features=features, gen_kwargs=arguments, split=NamedSplit(split))


def _column_rows(files, column, stamps):
    check = _is_ids if column == "input_ids" else _is_text
    for where, row in itertools.chain.from_iterable(map(json_rows, files)):
        value = row.get(column)
        if not check(value):
            raise TranscoderError(
                f"{printable(where)} has another value in the column '{printable(column)[:80]}' than the rows "
                "before it: fix the file."
            )
        yield {"input_ids" if column == "input_ids" else "text": value}


def _is_text(value):
    return value is None or isinstance(value, str)


def _is_ids(value):
    return isinstance(value, list) and all(type(number) is int and 0 <= number < 2**63 for number in value)
