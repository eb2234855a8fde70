"""Read and check the files of a task."""

from pathlib import Path
from typing import Any

from ..errors import TranscoderError
from ..text.checked import checked, entry
from ..text.printable import printable
from ..text.strict_json import read_json


_TOKEN_LISTS = ("clean_ids", "corrupted_ids", "answer_ids", "wrong_ids", "candidate_ids")
_LARGEST_ID = 2**31 - 1


def read_task(description_path: Path, rows_path: Path) -> dict[str, Any]:
    """Read the arguments of [`Task`] from the two files of its folder.

    Raises:
        [`TranscoderError`]: a file cannot be read, or its parts do not fit each other.
    """
    import pyarrow
    import pyarrow.parquet
    from datasets import Dataset
    from datasets.table import InMemoryTable

    try:
        found = _check_description(read_json(description_path), str(description_path))
        table = pyarrow.parquet.read_table(rows_path)
        _check_rows(table, printable(rows_path))
        # Drop the type annotations of the file, and keep the types that were checked.
        table = table.replace_schema_metadata(None)
        return {"dataset": Dataset(InMemoryTable(table)), **found}
    except TranscoderError as error:
        reason = str(error).rstrip(".")
    except Exception as error:
        # Damaged files can raise any exception.
        reason = f"{type(error).__name__}, {printable(error)[:200]}"
    raise TranscoderError(f"The task in {printable(rows_path.parent)} cannot be read ({reason}): save it again.")


def _check_description(description, source):
    return {
        "name": entry(description, "name", str, source),
        "description": checked(description.get("description", ""), str, f"'description' in {source}"),
        "metric": checked(description.get("metric", "logit_difference"), str, f"'metric' in {source}"),
        "settings": checked(description.get("settings"), dict, f"'settings' in {source}", null=True),
    }


def _check_rows(table, source):
    """Check the types of all columns, and whether the columns fit each other."""
    import pyarrow

    kinds = dict.fromkeys(("clean", "corrupted"), pyarrow.types.is_string)
    kinds |= dict.fromkeys(_TOKEN_LISTS, _is_list_of_ints)
    kinds |= {"positions": _is_struct_of_ints, "template": pyarrow.types.is_integer}
    corrupted = {"corrupted", "corrupted_ids"} & set(table.column_names)
    for name, fits in kinds.items():
        if name in ("corrupted", "corrupted_ids") and not corrupted:
            continue
        if table.column_names.count(name) != 1:
            raise TranscoderError(f"{source} lacks the column '{name}'")
        column = table.column(name)
        if not fits(column.type) or column.null_count:
            raise TranscoderError(
                f"The column '{name}' in {source} is of type {printable(column.type)[:80]}, or has gaps"
            )
    if not table.num_rows:
        raise TranscoderError(f"{source} has no rows")
    rows = table.select([name for name in kinds if name in table.column_names]).to_pylist()
    if "END" not in rows[0]["positions"]:
        raise TranscoderError(f"{source} has no position 'END'")
    for number, row in enumerate(rows):
        if wrong := _fault(row):
            raise TranscoderError(f"Row {number} of {source} has {wrong}")


def _fault(row) -> str | None:
    """The first fault of a row, if any."""
    ids = row["clean_ids"]
    for name in _TOKEN_LISTS:
        if any(id_ is None or not 0 <= id_ <= _LARGEST_ID for id_ in row.get(name, ())):
            return f"'{name}' that are not token ids"
    if not ids or not row["answer_ids"]:
        return "no tokens or no right answer"
    if len(row.get("corrupted_ids", ids)) != len(ids):
        return "prompts of different lengths"
    if set(row["answer_ids"]) & set(row["wrong_ids"]):
        return "a token that is a right and a wrong answer"
    if not set(row["answer_ids"]) <= set(row["candidate_ids"]):
        return "a right answer that is not among the candidates"
    if any(position is None or not 0 <= position < len(ids) for position in row["positions"].values()):
        return "a position that its prompt does not have"
    return None


def _is_list_of_ints(kind):
    import pyarrow.types as types

    is_list = types.is_list(kind) or types.is_large_list(kind)
    return is_list and types.is_integer(kind.value_type)


def _is_struct_of_ints(kind):
    import pyarrow.types as types

    return types.is_struct(kind) and all(types.is_integer(field.type) for field in kind) and len(kind) > 0
