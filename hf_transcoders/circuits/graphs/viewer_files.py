"""Write attribution graphs and their features as a folder that published viewers open.

Files lie where the server of circuit-tracer 0.5.0 looks for them, which maps both `/data/` and `/graph_data/` onto the folder.
"""

import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ...errors import TranscoderError
from ...features.feature_examples import FeatureExplanation
from ...files import atomic_directory, is_inside, read_settled, signature, write_text
from ...fingerprint import digest_of
from ...text.checked import entries, entry
from ...text.printable import printable
from ...text.strict_json import read_json
from .graph import AttributionGraph
from .node_ids import LayerNumbers
from .viewer import NAME, OVERVIEW, cantor, dump, model_name, viewer_graph


_FEATURES = "./data/features/"
_PERCENT = [percent / 100 for percent in range(1, 101)]


def feature_json(explanation: FeatureExplanation, number: int, dictionary: str) -> dict[str, Any]:
    """Convert a feature to the JSON object of the published viewers.

    `histogram` and `quantile_values` (percentiles 1 to 100) are of the activations on the tokens on which the feature is active.

    Args:
        explanation ([`FeatureExplanation`]): Explanation of the feature.
        number (`int`): Cantor number of the feature.
        dictionary (`str`): Name of the dictionary.

    Returns:
        `dict`
    """
    groups = {"Top activations": explanation.contexts, **explanation.quantile_contexts}
    largest, histogram = explanation.max_activation, explanation.histogram
    return {
        "index": number,
        "transcoder_id": dictionary,
        "examples_quantiles": [
            {"quantile_name": name, "examples": [_example(context) for context in contexts]}
            for name, contexts in groups.items()
        ],
        "top_logits": [token for token, _ in explanation.top_tokens],
        "bottom_logits": [token for token, _ in explanation.bottom_tokens],
        # Histograms begin at 0.
        "act_min": 0.0,
        "act_max": largest,
        "quantile_values": [min(value, largest) for value in histogram.quantiles(_PERCENT)] if histogram else [],
        "histogram": histogram.counts if histogram else [],
        "activation_frequency": explanation.density,
    }


def _example(context):
    return {
        "tokens": context.tokens,
        "tokens_acts_list": context.activations,
        "train_token_ind": context.peak,
        "is_repeated_datapoint": False,
    }


def write_viewer_files(
    folder: str | os.PathLike,
    graphs: Mapping[str, AttributionGraph],
    features: Mapping[str, Sequence[FeatureExplanation]] | None = None,
    *,
    scan: str | None = None,
    feature_base_url: str | None = None,
) -> Path:
    """Write graphs as the files that the server of circuit-tracer opens: `circuit-tracer start-server --graph_file_dir FOLDER`.

    `{slug}.json` for each graph, `graph-metadata.json` with the metadata of all graphs in the folder, and
    `features/{name}/{number}.json` for each feature in the graphs, where `name` is made of the model's name and a digest of
    the files. Graphs of earlier calls stay in the folder; one with the same slug is replaced.

    Args:
        folder (`str` or `os.PathLike`): Folder to write to, which gets all files or none.
        graphs (`Mapping[str, AttributionGraph]`): Slug -> graph. All graphs have the same dictionaries.
        features (`Mapping[str, Sequence[FeatureExplanation]]`, *optional*): Dictionary -> explanations.
        scan (`str`, *optional*): As for [`viewer_graph`], by default the path of the files of features.
        feature_base_url (`str`, *optional*):
            Public https address to which the content of `features/{name}/` is copied, for Neuronpedia.

    Returns:
        `Path`: the folder.

    Raises:
        [`TranscoderError`]: there are no graphs, their dictionaries differ, a name or address is not usable, or the folder
            has a list of graphs that is damaged.
    """
    if not graphs:
        raise TranscoderError("There is no graph to write: give at least one, as {slug: graph}.")
    first = next(iter(graphs.values()))
    for slug, graph in graphs.items():
        if graph.dictionaries != first.dictionaries:
            raise TranscoderError(
                f"The graph '{printable(slug)}' has other dictionaries than the first, so that their features would be mixed "
                "up: write it with a separate call."
            )
    for name in features or {}:
        first.dictionary_number(name)  # Refuses names that the graphs do not have.
    numbers = LayerNumbers(*graphs.values())
    files = {number: dump(content) for number, content in _features(graphs, features or {}, numbers).items()}
    # A separate name, so that files of other dictionaries with the same numbers are never mixed up with these.
    name = f"{model_name(first)}-{digest_of(files).split(':')[-1][:8]}"
    data = {
        slug: viewer_graph(
            graph,
            slug,
            scan or _FEATURES + name,
            features=features,
            feature_base_url=feature_base_url,
            numbers=numbers,
        )
        for slug, graph in graphs.items()
    }
    overview = Path(folder, f"{OVERVIEW}.json")
    before = signature(overview)
    listed = _listed(overview) if before else []
    kept = [other for other in listed if other["slug"] not in data]
    listing = {"graphs": [*kept, *(content["metadata"] for content in data.values())]}
    with atomic_directory(folder, unchanged={overview: before}) as partial:
        for slug, content in data.items():
            write_text(partial / f"{slug}.json", dump(content))
        write_text(partial / overview.name, dump(listing))
        path = partial / "features" / name
        path.mkdir(parents=True)
        for number, text in files.items():
            # Thousands of files: `write_text` would look for leftovers among them each time.
            Path(path, f"{number}.json").write_text(text, encoding="utf-8")
    _remove_features(
        [other for other in listed if other["slug"] in data], {*map(_place, listing["graphs"]), name}, folder
    )
    return Path(folder)


def _features(graphs, features, numbers):
    """Number -> JSON object of each explained feature of a dictionary with nodes, and of each feature in the graphs."""
    found = {}
    for graph in graphs.values():
        for name, features_of in graph.feature_numbers().items():
            dictionary = graph.dictionary_number(name)
            for feature in features_of:
                number = cantor(numbers.layer(dictionary), numbers.feature(dictionary, feature))
                found[number] = _unexplained(number, name)
    first = next(iter(graphs.values()))
    for name, explanations in features.items():
        dictionary = first.dictionary_number(name)
        layer = numbers.layer(dictionary)
        # No graph leads to the features of a dictionary without a node.
        for explanation in explanations if layer is not None else ():
            number = cantor(layer, numbers.feature(dictionary, explanation.feature))
            found[number] = feature_json(explanation, number, name)
    return found


def _unexplained(number, dictionary):
    """A feature that no text was searched for. The client would fail without a file, and accepts one without contexts."""
    return {
        "index": number,
        "transcoder_id": dictionary,
        "examples_quantiles": [{"quantile_name": "No text was searched for this feature.", "examples": []}],
        "top_logits": [],
        "bottom_logits": [],
    }


def _listed(path):
    """Metadata of the graphs that a folder has already."""

    def read(opening):
        listed = entries(read_json(opening(path)), "graphs", dict, path.name)
        for metadata in listed:
            entry(metadata, "slug", str, path.name)
        return listed

    try:
        return read_settled(path.parent, read)
    except TranscoderError as error:
        raise TranscoderError(
            f"The graphs in {printable(path.parent)} cannot be added to, because its list is not readable "
            f"({str(error).rstrip('.')}): repair or remove {path.name}, or choose another folder."
        ) from error


def _place(metadata):
    """Name of the folder in `features/` that a graph refers to, or `None`."""
    scan = metadata.get("scan")
    return scan.removeprefix(_FEATURES) if isinstance(scan, str) and scan.startswith(_FEATURES) else None


def _remove_features(replaced, used, folder):
    """Remove the features of graphs that were replaced, where no other graph refers to them."""
    for metadata in replaced:
        name, info = _place(metadata), metadata.get("info")
        ours = isinstance(info, dict) and isinstance(info.get("generator"), dict)
        # The list may come from an untrusted source.
        if not ours or info["generator"].get("name") != "hf_transcoders" or not name or not NAME.fullmatch(name):
            continue
        path = Path(folder, "features", name)
        if name not in used and is_inside(path, folder):
            shutil.rmtree(path, ignore_errors=True)
