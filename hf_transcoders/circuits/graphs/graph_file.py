"""Save attribution graphs to files, and load them with every check that scores, pages and exports rely on."""

import dataclasses
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ...errors import TranscoderError
from ...files import atomic_directory, read_settled, write_text
from ...lm.sites import Site
from ...text.checked import checked, entries, entry, only
from ...text.printable import printable
from ...text.strict_json import read_json, to_json
from .influence import row_magnitudes
from .nodes import KINDS, TargetInfo, is_kind


TENSORS_NAME, INFO_NAME = "graph.safetensors", "graph.json"
FORMAT_VERSION = 1
_WHOLE = ("kind", "layer", "position", "index", "dictionary")
_REAL = ("value", "total", "rest", "rest_abs", "rest_error")
_EDGES = ("source", "target", "weight")
_TARGETS = ("target_vector", "target_bias")
#: Names of the tensors of a graph.
TENSORS = (*_WHOLE, *_REAL, *_EDGES, *_TARGETS)
#: Names of the tensors that only pruned graphs have, and files of earlier versions lack.
OPTIONAL_TENSORS = ("cumulative_influence",)
_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# Distance of a row from its total, relative to its size, that is allowed beyond the error in the file: sums are in float32.
_ROUNDING = 1e-3


def save_graph(folder: str | os.PathLike, tensors: dict[str, torch.Tensor], info: dict[str, Any]) -> None:
    """Save a graph as `graph.safetensors` and `graph.json`, both or neither.

    Args:
        folder (`str` or `os.PathLike`): Folder to save to.
        tensors (`dict[str, torch.Tensor]`): The tensors of [`TENSORS`], and those of [`OPTIONAL_TENSORS`] that there are.
        info (`dict`): All other values of the graph, as JSON.
    """
    with atomic_directory(folder, replacing="graph.*") as partial:
        contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
        save_file(contiguous, partial / TENSORS_NAME, metadata={"format": "pt"})
        text = to_json({"format_version": FORMAT_VERSION, **info}, ensure_ascii=False)
        write_text(partial / INFO_NAME, text + "\n")


def read_graph(name_or_path: str | os.PathLike, **kwargs) -> dict[str, Any]:
    """Load a graph from a folder or the Hub.

    Args:
        name_or_path (`str` or `os.PathLike`): Folder or Hub id.
        kwargs: Arguments of [`~transformers.utils.cached_file`].

    Returns:
        `dict`: the arguments of [`AttributionGraph`].

    Raises:
        [`TranscoderError`]: the folder or repo has no graph, or its files are damaged or too new.
    """
    from transformers.utils import cached_file

    def read(opening=lambda path: path):
        try:
            paths = [cached_file(name_or_path, name, **kwargs) for name in (INFO_NAME, TENSORS_NAME)]
        except (OSError, ValueError) as error:
            raise TranscoderError(
                f"{printable(name_or_path)} is not an attribution graph (no {INFO_NAME} and {TENSORS_NAME} there): give a "
                "folder or repo to which `save_pretrained` of a graph has saved."
            ) from error
        return _read_files(*(opening(path) for path in paths))

    folder = Path(name_or_path, kwargs.get("subfolder") or "")
    # Both files are from the same save, even where another process saves there meanwhile.
    return read_settled(folder, read) if folder.is_dir() else read()


def _read_files(info_path, tensors_path):
    try:
        return _read(info_path, tensors_path)
    except TranscoderError as error:
        if isinstance(error, _TooNew):
            raise
        reason = str(error).rstrip(".")
    except (SafetensorError, OSError) as error:
        reason = printable(error)[:200]
    raise TranscoderError(
        f"The graph in {printable(Path(info_path).parent)} cannot be read ({reason}): a file is damaged or cut short, so copy or "
        "download it again."
    )


class _TooNew(TranscoderError):
    pass


def _read(info_path, tensors_path):
    info = read_json(info_path)
    version = entry(info, "format_version", int, INFO_NAME, low=1)
    if version > FORMAT_VERSION:
        raise _TooNew(
            f"This graph was written in format {version}, and this version of hf_transcoders reads up to format "
            f"{FORMAT_VERSION}: upgrade it with `pip install -U hf_transcoders`."
        )
    _check_info(info)
    with safe_open(tensors_path, framework="pt") as file:
        tensors = _tensors(file)
    values = {name: info[name] for name in ("input_ids", "tokens", "dictionaries", "num_layers", "metadata")}
    values |= tensors
    values["targets"] = [TargetInfo(**target) for target in info["targets"]]
    graph = SimpleNamespace(**values)
    _check_nodes(graph)
    _check_edges(graph)
    _check_rows(graph)
    return values


# ---------------------------------------------------------------------------------------------------- JSON


def _check_info(info: dict[str, Any]) -> None:
    layers = entry(info, "num_layers", int, INFO_NAME, low=1, high=100_000)
    entries(info, "input_ids", int, INFO_NAME, low=0)
    entries(info, "tokens", str, INFO_NAME)
    if len(info["tokens"]) != len(info["input_ids"]):
        raise _unfit(f"{len(info['tokens'])} tokens and {len(info['input_ids'])} ids")
    entries(info, "dictionaries", str, INFO_NAME)
    if len(set(info["dictionaries"])) < len(info["dictionaries"]):
        raise _unfit("two dictionaries of one name")
    known = [field.name for field in dataclasses.fields(TargetInfo)]
    for target in entries(info, "targets", dict, INFO_NAME):
        where = f"a target in {INFO_NAME}"
        only(target, known, where)
        entry(target, "label", str, where)
        entry(target, "position", int, where, low=-1, high=len(info["tokens"]) - 1 if info["tokens"] else 2**31)
        entry(target, "weight", float, where, low=0)
        checked(target.get("probability"), float, f"'probability' of {where}", null=True, low=0, high=1.001)
        checked(target.get("token_id"), int, f"'token_id' of {where}", null=True, low=0)
        checked(target.get("layer"), int, f"'layer' of {where}", null=True, low=-1, high=layers)
        checked(target.get("point"), str, f"'point' of {where}", null=True)
    if not info["targets"] or not sum(target["weight"] for target in info["targets"]):
        raise _unfit("no target with a weight")
    _check_metadata(entry(info, "metadata", dict, INFO_NAME))


def _check_metadata(metadata: dict[str, Any]) -> None:
    """Check the metadata that pages, cards and exports read; other metadata is shown as it is."""
    where = f"the metadata in {INFO_NAME}"
    for name in ("model", "revision", "dtype", "warning"):
        checked(metadata.get(name), str, f"'{name}' of {where}", null=True)
    checked(metadata.get("largest_row_error"), float, f"'largest_row_error' of {where}", null=True, low=0)
    for each in entries(metadata, "dictionaries", dict, where) if "dictionaries" in metadata else ():
        entry(each, "name", str, where)
        if "output_site" in each:
            Site.parse(entry(each, "output_site", str, where))
        if "output_sites" in each:
            for site in entries(each, "output_sites", str, where):
                Site.parse(site)
    if (scores := checked(metadata.get("scores"), dict, f"'scores' of {where}", null=True)) is not None:
        for name in ("replacement", "completeness", "rest"):
            entry(scores, name, float, where, low=-_ROUNDING, high=1 + _ROUNDING)
    if (pruning := checked(metadata.get("pruning"), dict, f"'pruning' of {where}", null=True)) is not None:
        for name in ("nodes", "edges"):
            entry(pruning, name, float, where, low=0, high=1)
        for name in ("dropped_nodes", "dropped_error_nodes"):
            entry(pruning, name, int, where, low=0)
        for name in ("dropped_influence", "dropped_error_influence"):
            entry(pruning, name, float, where, low=-_ROUNDING, high=1 + _ROUNDING)
        # Graphs that earlier versions pruned have neither.
        for what in ("edge", "feature"):
            if f"dropped_{what}s" in pruning:
                entry(pruning, f"dropped_{what}s", int, where, low=0)
                entry(pruning, f"dropped_{what}_influence", float, where, low=-_ROUNDING, high=1 + _ROUNDING)
        for name in ("features_from", "features_edges"):
            checked(pruning.get(name), float, f"'{name}' of {where}", null=True, low=0, high=1)
        checked(pruning.get("features_then"), int, f"'features_then' of {where}", null=True, low=0)
    checked(metadata.get("active_features", 0), int, f"'active_features' of {where}", low=0)
    if "notes" in metadata:
        entries(metadata, "notes", str, where)
    settings = checked(metadata.get("settings", {}), dict, f"'settings' of {where}")
    for name, low in (("max_logits", 1), ("max_features", 1), ("skip_first", 0)):
        if name in settings:
            entry(settings, name, int, where, low=low)
    if "logit_mass" in settings:
        entry(settings, "logit_mass", float, where, low=0, high=1)
    certificate = checked(metadata.get("certificate"), dict, f"'certificate' of {where}", null=True) or {}
    for mode in certificate:
        _check_validation(entry(certificate, mode, dict, where), where)
    # Each edge has one value per mode.
    for edge in entries(metadata, "validated_edges", dict, where) if "validated_edges" in metadata else ():
        for name in ("source_label", "target_label"):
            entry(edge, name, str, where)
        for name in ("predicted", *certificate):
            entry(edge, name, float, where, null=True)


def _check_validation(found, where):
    entry(found, "edges", int, where, low=0)
    for name in ("pearson", "spearman"):
        entry(found, name, float, where, null=True)
    depths = entry(found, "by_depth", dict, where)
    for each in (found, *(entry(depths, depth, dict, where) for depth in depths)):
        entry(each, "edges", int, where, low=0)
        for name in ("sign_agreement", "relative_error"):
            entry(each, name, float, where, null=True)
    for each in (found, *depths.values()):
        # JSON has no NaN.
        each.update({name: float("nan") for name, value in each.items() if value is None})


# ---------------------------------------------------------------------------------------------------- tensors


def _tensors(file) -> dict[str, torch.Tensor]:
    """Read the tensors of a graph, and check their types and shapes."""
    if missing := [name for name in TENSORS if name not in set(file.keys())]:
        raise _unfit(f"no tensor '{missing[0]}'")
    tensors = {}
    for name in (*TENSORS, *(name for name in OPTIONAL_TENSORS if name in set(file.keys()))):
        dimensions = len(file.get_slice(name).get_shape())
        tensor = file.get_tensor(name)
        allowed = (torch.int64,) if name in (*_WHOLE, "source", "target") else _DTYPES
        if dimensions != (2 if name == "target_vector" else 1) or tensor.dtype not in allowed:
            raise _unfit(f"the tensor '{name}' of type {tensor.dtype} with {dimensions} dimensions")
        tensors[name] = tensor
    sums = {tensors[name].dtype for name in (*_REAL, "weight")}
    if len(sums) > 1 or sums & {torch.bfloat16, torch.float16}:
        raise _unfit(f"numbers of the types {', '.join(sorted(map(str, sums)))}, which are float32 in a graph")
    return tensors


def _check_nodes(graph: SimpleNamespace) -> None:
    count = len(graph.kind)
    for name in (*_WHOLE, *_REAL):
        if len(getattr(graph, name)) != count:
            raise _unfit(f"{len(getattr(graph, name))} numbers '{name}' for {count} nodes")
    if len(graph.target_vector) != len(graph.targets) or len(graph.target_bias) != len(graph.targets):
        raise _unfit(f"vectors of {len(graph.target_vector)} targets where there are {len(graph.targets)}")
    for name in ("value", "rest", "rest_abs", "rest_error", "weight", "target_vector", "target_bias"):
        if not getattr(graph, name).isfinite().all():
            raise _unfit(f"'{name}' that is not a finite number")
    if graph.total.isinf().any():
        raise _unfit("'total' that is not a finite number")
    if (cumulative := getattr(graph, "cumulative_influence", None)) is not None:
        if len(cumulative) != count or not ((cumulative >= 0) & (cumulative <= 1)).all():
            raise _unfit("'cumulative_influence' that is not a share for each node")
    _within(graph.kind, 0, len(KINDS) - 1, "kind")
    _within(graph.layer, -1, graph.num_layers, "layer")
    # Graphs that are summed over positions have no tokens; the index of a position embedding is its position.
    _within(graph.position, -1, len(graph.tokens) - 1, "position")
    _within(graph.index, -1, 2**53, "index")
    of_dictionary = is_kind(graph.kind, "feature", "error")
    _within(graph.dictionary[of_dictionary], 0, len(graph.dictionaries) - 1, "dictionary")
    _within(graph.dictionary[~of_dictionary], -1, -1, "dictionary")
    _within(graph.index[is_kind(graph.kind, "feature", "token")], 0, 2**53, "index")
    if graph.tokens:
        _within(graph.position[~is_kind(graph.kind, "bias")], 0, len(graph.tokens) - 1, "position")
    embeddings = is_kind(graph.kind, "token", "position")
    _within(graph.layer[embeddings], -1, -1, "layer")
    _within(graph.layer[~embeddings], 0, graph.num_layers, "layer")
    targets = graph.index[is_kind(graph.kind, "target")]
    if targets.sort().values.tolist() != list(range(len(graph.targets))):
        raise _unfit("targets that are not its nodes, each once")
    columns = torch.stack([getattr(graph, name) for name in _WHOLE], dim=1)
    if len(columns.unique(dim=0)) < count:
        raise _unfit("two equal nodes")


def _within(values, low, high, name):
    if len(values) and (values.min() < low or values.max() > high):
        wrong = values[(values < low) | (values > high)][0]
        raise _unfit(f"'{name}' {wrong}, which is not from {low} to {high}")


def _check_edges(graph: SimpleNamespace) -> None:
    source, target, count = graph.source, graph.target, len(graph.kind)
    if not len(source) == len(target) == len(graph.weight):
        raise _unfit("edges without a source, target or weight")
    _within(source, 0, count - 1, "source")
    _within(target, 0, count - 1, "target")
    if (source >= target).any():
        raise _unfit("an edge that does not lead from a lower to a higher node")
    if (target.diff() < 0).any():
        raise _unfit("edges that are not in the order of their targets")
    pairs = (target * count + source).sort().values
    if (pairs.diff() == 0).any():
        raise _unfit("two edges between the same nodes")
    has_row = ~graph.total.isnan()
    if len(target) and not has_row[target].all():
        raise _unfit("an edge into a node that has no row")
    if not has_row[is_kind(graph.kind, "target")].all() or has_row[~is_kind(graph.kind, "feature", "target")].any():
        raise _unfit("a target without a row, or a row of a node that is not a feature or target")


def _check_rows(graph: SimpleNamespace) -> None:
    """Refuse rows that do not sum to their totals within the error that the file states."""
    weight = graph.weight.double()
    sums = graph.rest.double().index_add(0, graph.target, weight)
    # In a pruned graph the largest weight may be part of the rest.
    size = graph.total.double().abs().maximum(graph.rest_abs.double())
    size = size.scatter_reduce(0, graph.target, weight.abs(), "amax").clamp(min=1e-30)
    off = ((sums - graph.total.double()).abs() / size)[~graph.total.isnan()].max().item()
    magnitude = row_magnitudes(graph.target, graph.weight, graph.rest_abs)
    parts = torch.stack([graph.rest.double().abs(), graph.rest_error.double()])
    if (
        (graph.rest_abs < 0).any()
        or (graph.rest_error < 0).any()
        or (parts > graph.rest_abs + _ROUNDING * magnitude).any()
    ):
        raise _unfit("a rest with a part that is larger than the whole")
    known = graph.metadata.get("largest_row_error") or 0.0
    if off > known + _ROUNDING:
        raise _unfit(f"a row that is {off:.2g} off its total, where {known:.2g} was measured")


def _unfit(what: str) -> TranscoderError:
    return TranscoderError(f"{TENSORS_NAME} and {INFO_NAME} do not fit each other, because of {what}")
