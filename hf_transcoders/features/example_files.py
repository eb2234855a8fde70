"""Write and read the examples and counts of features: one safetensors file for each dictionary, one for the text, and JSON."""

import os
from collections.abc import Mapping
from contextlib import contextmanager
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..errors import TranscoderError
from ..files import atomic_directory, read_settled
from ..text.checked import checked, entry, only
from ..text.printable import printable
from ..text.strict_json import read_json, to_json
from .activation_histograms import NUM_BINS
from .examples import ExampleGroup, ExampleText, FeatureExamples
from .running_examples import NUM_INTERVALS, NUM_POSITION_GROUPS, SILENT_GROUPS, ExampleSizes


EXAMPLES_NAME = "feature_examples.json"
_TEXT_NAME = "example_text.safetensors"
_FORMAT = 1
_MOST = 2**31 - 1
_CORRELATED = 10
# Tensors of a dictionary besides its groups: type and shape after the number of features.
_COUNTS = {
    "bins": (torch.int32, (NUM_BINS,)),
    "exponents": (torch.int32, ()),
    "squares": (torch.float64, ()),
    "position_counts": (torch.int64, (NUM_POSITION_GROUPS,)),
    "position_sums": (torch.float64, (NUM_POSITION_GROUPS,)),
    "correlated": (torch.int32, (_CORRELATED,)),
    "correlations": (torch.float32, (_CORRELATED,)),
}
_GROUP = {
    "scores": torch.float32, "values": torch.float32, "rows": torch.int32, "positions": torch.int32,
    "windows": torch.float16,
}  # fmt: skip
_TEXT = {"tokens": torch.int32, "documents": torch.int32, "offsets": torch.int64, "rows": torch.int64}


def save_examples(
    examples: Mapping[str, FeatureExamples], folder: str | os.PathLike, facts: Mapping[str, Any] | None = None
) -> Path:
    """
    Write the examples of the dictionaries of one pass into a folder, atomically.

    Args:
        examples (`Mapping[str, FeatureExamples]`): Examples by name of the dictionary, as [`collect_examples`] returns them.
        folder (`str` or `os.PathLike`): Folder to write; other files in it are kept.
        facts (`Mapping[str, Any]`, *optional*): JSON data about the pass, such as the language model, to be read back.

    Returns:
        `Path`: the folder.
    """
    if not examples:
        raise TranscoderError("There are no examples to save: collect those of at least one dictionary.")
    first = next(iter(examples.values()))
    listed = {}
    with atomic_directory(folder, replacing="examples-*.safetensors") as partial:
        tensors = {name: getattr(first.text, name).contiguous() for name in _TEXT}
        save_file({**tensors, "position_tokens": first.position_tokens}, partial / _TEXT_NAME)
        for number, (name, its) in enumerate(examples.items()):
            file = f"examples-{number:03d}.safetensors"
            tensors = {part: getattr(its, part).contiguous() for part in _COUNTS}
            for group, parts in its.groups.items():
                tensors |= {f"{group}.{part}": getattr(parts, part).contiguous() for part in _GROUP}
            save_file(tensors, partial / file)
            listed[name] = {"file": file, "num_features": its.num_features, "sizes": asdict(its.sizes)}
        content = {
            "format": _FORMAT,
            "num_tokens": first.num_tokens,
            "dictionaries": listed,
            "facts": dict(facts or {}),
        }
        (partial / EXAMPLES_NAME).write_text(to_json(content), encoding="utf-8")
    return Path(folder)


def read_example_facts(folder: str | os.PathLike) -> dict[str, Any]:
    """The facts that [`save_examples`] was given."""
    return _read_index(Path(folder))["facts"]


def load_examples(folder: str | os.PathLike, names: list[str] | None = None) -> dict[str, FeatureExamples]:
    """
    Read the examples that [`save_examples`] wrote.

    Args:
        folder (`str` or `os.PathLike`): The folder.
        names (`list[str]`, *optional*): Names of the dictionaries to read. All by default.

    Returns:
        `dict[str, FeatureExamples]`: examples by name of the dictionary.

    Raises:
        [`TranscoderError`]: there are none, a file is damaged or of another kind, or a dictionary is not among them.
    """
    folder = Path(folder)

    def read(settled):
        settled(folder / EXAMPLES_NAME)
        index = _read_index(folder)
        listed = index["dictionaries"]
        for name in names or []:
            if name not in listed:
                raise TranscoderError(
                    f"{printable(folder)} has no examples of '{printable(name)}': it has {printable(', '.join(listed))}."
                )
        text, position_tokens = _read_text(settled(folder / _TEXT_NAME))
        return {
            name: _read_dictionary(settled(folder / listed[name]["file"]), listed[name], index, text, position_tokens)
            for name in (listed if names is None else names)
        }

    return read_settled(folder, read)


def _read_index(folder):
    path = folder / EXAMPLES_NAME
    if not path.is_file():
        raise TranscoderError(
            f"{printable(folder)} has no examples of features ({EXAMPLES_NAME}): collect them with `collect_examples` and "
            "`save_examples`."
        )
    source, index = str(path), read_json(path)
    if checked(index.get("format"), int, f"'format' in {source}") != _FORMAT:
        raise TranscoderError(
            f"{printable(source)} has the format {index['format']}, and this version reads {_FORMAT}: collect the examples "
            "again, or use the version that wrote them."
        )
    only(index, ("format", "num_tokens", "dictionaries", "facts"), source)
    entry(index, "num_tokens", int, source, low=1)
    entry(index, "facts", dict, source)
    for number, (name, its) in enumerate(entry(index, "dictionaries", dict, source).items()):
        where = f"'{name}' in {source}"
        checked(its, dict, where)
        only(its, ("file", "num_features", "sizes"), where)
        if entry(its, "file", str, where) != f"examples-{number:03d}.safetensors":
            raise TranscoderError(f"'file' of {printable(where)} is not a file of examples: collect them again.")
        entry(its, "num_features", int, where, low=1, high=_MOST)
        names = [field.name for field in fields(ExampleSizes)]
        only(entry(its, "sizes", dict, where), names, where)
        for name in names:
            entry(its["sizes"], name, int, where, low=1 if name == "window" else 0, high=_MOST)
    return index


def _read_text(path):
    with _opened(path) as tensors:
        parts = {name: _tensor(tensors, name, dtype, None, path) for name, dtype in _TEXT.items()}
        position_tokens = _tensor(tensors, "position_tokens", torch.int64, (NUM_POSITION_GROUPS,), path)
    tokens, offsets = parts["tokens"], parts["offsets"]
    begins = len(offsets) > 1 and offsets[0] == 0 and offsets[-1] == len(tokens) and (offsets.diff() >= 0).all()
    if not begins or len(parts["documents"]) != len(tokens) or len(parts["rows"]) != len(offsets) - 1:
        raise _damaged(path, "its rows do not fit its tokens")
    if any((parts[name] < 0).any() for name in ("tokens", "documents", "rows")) or (position_tokens < 0).any():
        raise _damaged(path, "it has numbers below 0")
    return ExampleText(**parts), position_tokens


def _read_dictionary(path, described, index, text, position_tokens):
    count, sizes = described["num_features"], ExampleSizes(**described["sizes"])
    with _opened(path) as tensors:
        counts = {
            name: _tensor(tensors, name, dtype, (count, *shape), path) for name, (dtype, shape) in _COUNTS.items()
        }
        groups = {}
        for name, size in sizes.groups.items():
            shape = (count, NUM_INTERVALS, size) if name == "interval" else (count, size)
            window = 0 if name in SILENT_GROUPS else sizes.window
            groups[name] = ExampleGroup(
                **{
                    part: _tensor(
                        tensors, f"{name}.{part}", dtype, (*shape, window) if part == "windows" else shape, path
                    )
                    for part, dtype in _GROUP.items()
                }
            )
    lengths = text.offsets.diff()
    for name, group in groups.items():
        rows, positions = group.rows.long(), group.positions
        inside = (rows >= 0) & (rows < len(text))
        if not inside.all() or (positions < 0).any() or (positions >= lengths[rows]).any():
            raise _damaged(path, f"'{name}' has places outside of the text")
    for name in ("bins", "position_counts", "squares"):
        if (counts[name] < 0).any():
            raise _damaged(path, f"'{name}' has numbers below 0")
    if (counts["correlated"] < -1).any() or (counts["correlated"] >= count).any():
        raise _damaged(path, "'correlated' has features that do not exist")
    if (counts["exponents"].abs() > 2**20).any() or ((counts["exponents"] > 128) & counts["bins"].any(1)).any():
        raise _damaged(path, "'exponents' is out of its range")
    return FeatureExamples(
        text=text,
        sizes=sizes,
        num_tokens=index["num_tokens"],
        groups=groups,
        position_tokens=position_tokens,
        **counts,
    )


@contextmanager
def _opened(path):
    try:
        with safe_open(path, "pt") as tensors:
            yield tensors
    except (SafetensorError, OSError) as error:
        raise _damaged(path, printable(error).splitlines()[0][:200]) from error


def _tensor(tensors, name, dtype, shape, path):
    """A tensor of a file, of one dimension if no shape is given."""
    if name not in tensors.keys():
        raise _damaged(path, f"'{name}' is missing")
    described = tensors.get_slice(name)
    found = tuple(described.get_shape())
    if (len(found) != 1 if shape is None else found != shape) or described.get_dtype() != _DTYPE_NAMES[dtype]:
        raise _damaged(path, f"'{name}' is of another shape or type")
    tensor = tensors.get_tensor(name)
    if tensor.is_floating_point() and not tensor.isfinite().all():
        raise _damaged(path, f"'{name}' is not of finite numbers")
    return tensor


_DTYPE_NAMES = {
    torch.int32: "I32", torch.int64: "I64", torch.float16: "F16", torch.float32: "F32", torch.float64: "F64",
}  # fmt: skip


def _damaged(path, reason):
    return TranscoderError(f"{printable(path)} is damaged or of another kind ({reason}): collect the examples again.")
