"""Verdicts in plain words on an attribution graph: its scores, its validation, and the parts that are not on its page.

The thresholds are conventions of this library, listed in `docs/graphs.md`.
"""

import re
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Literal


if TYPE_CHECKING:
    from .graph import AttributionGraph

_LAYER = re.compile(r"layers\.(\d+)\.")
# Least score of each level, with the sentence that opens the verdict.
_COMPLETENESS = (
    (0.8, "good", "Features and tokens carry most of this prompt"),
    (0.5, "fair", "Errors carry a large part of this prompt"),
    (0.0, "poor", "Errors carry most of this prompt"),
)
_REPLACEMENT = (
    (0.5, "good", "Most of the influence leads back to tokens"),
    (0.2, "fair", "Most of the influence begins at errors"),
    (0.0, "poor", "Almost all of the influence begins at errors"),
)
# Least correlation and share of equal signs, and largest error, with the sentence that opens the verdict.
_VALIDATION = (
    (0.8, 0.7, 0.5, "good", "Edges predict what ablations do in the model"),
    (0.5, 0.7, float("inf"), "fair", "Edges predict the direction but not the size of what ablations do in the model"),
    (-1.0, 0.0, float("inf"), "poor", "Edges do not predict what ablations do in the model"),
)
# Largest error of direct effects that rounding explains.
_EXACT = 0.01
_FEWEST_EDGES = 8


@dataclass(frozen=True)
class Verdict:
    """A verdict on a graph.

    Args:
        about (`str`): `"completeness"`, `"replacement"` or `"validation"`.
        level (`"good"`, `"fair"` or `"poor"`): Level of the scores.
        text (`str`): The verdict, one sentence with the scores.
    """

    about: str
    level: Literal["good", "fair", "poor"]
    text: str

    def to_dict(self) -> dict[str, str]:
        """All fields as JSON."""
        return asdict(self)


def graph_verdicts(graph: "AttributionGraph") -> list[Verdict]:
    """Verdicts on the scores of a graph before pruning, and on its validation if it has one.

    Args:
        graph ([`AttributionGraph`]): The graph.

    Returns:
        `list[Verdict]`: one for each of completeness, replacement and validation.
    """
    scores = graph.whole_scores
    found = [_completeness(scores["completeness"]), _replacement(scores["replacement"])]
    summary = graph.metadata.get("certificate") or {}
    # The mode with the least held fixed is the claim that matters.
    mode = next((name for name in ("free", "frozen", "direct") if name in summary), None)
    return found if mode is None else [*found, _validation(summary, mode)]


def _completeness(score):
    level, opening = _first(_COMPLETENESS, score)
    return Verdict(
        "completeness",
        level,
        f"{opening}: {_percent(1 - score)} of the inputs of nodes come from errors of dictionaries and from MLPs without "
        "a dictionary.",
    )


def _replacement(score):
    level, opening = _first(_REPLACEMENT, score)
    return Verdict(
        "replacement",
        level,
        f"{opening}: followed to its beginnings, {_percent(score)} of the influence comes from tokens and {_percent(1 - score)} "
        "from errors and MLPs without a dictionary.",
    )


def _first(levels, score):
    return next((level, opening) for least, level, opening in levels if score >= least or least == 0)


def _validation(summary, mode):
    found = summary[mode]
    edges, correlation = found["edges"], found["pearson"]
    if edges < _FEWEST_EDGES or correlation is None or correlation != correlation:
        return Verdict("validation", "poor", f"Too few edges were validated for a verdict: {_count(edges, 'edge')}.")
    direct = summary.get("direct", {}).get("relative_error", 0.0)
    figures = (
        f"correlation {correlation:.2f}, same sign in {_percent(found['sign_agreement'])} of {_count(edges, 'edge')}, "
        f"error {_percent(found['relative_error'])} of the size of the predictions"
    )
    if direct is None or direct > _EXACT:
        return Verdict(
            "validation",
            "poor",
            f"Edges are not even the direct effects that they should be (error {_percent(direct or 1)}).",
        )
    level, opening = next(
        (level, opening)
        for least, same, most, level, opening in _VALIDATION
        if level == "poor"
        or (correlation >= least and found["sign_agreement"] >= same and found["relative_error"] <= most)
    )
    return Verdict("validation", level, f"{opening}: {figures}.")


def missing_features(graph: "AttributionGraph") -> str | None:
    """Why a graph has no features, and what to do; `None` if it has some.

    Args:
        graph ([`AttributionGraph`]): The graph, pruned or not.

    Returns:
        `str` or `None`: two sentences.
    """
    if graph.is_kind("feature").any():
        return None
    pruning = graph.metadata.get("pruning") or {}
    covered = _covers(graph)
    dropped = pruning.get("dropped_features")
    if not dropped:
        active = graph.metadata.get("active_features")
        why = f"No feature is active on this prompt: the set {covered}."
        if active:
            why = f"None of the {active:,} active features became a node: the set {covered}."
        return f"{why} Check that the dictionaries are trained (`hf-transcoders evaluate`), or train them for more layers."
    share, then = pruning.get("features_from"), pruning.get("features_then")
    advice = "Train dictionaries for more layers, or on more text."
    if share is not None and then:
        # The share of edges is named where it has to change, too.
        edges = pruning.get("features_edges") or pruning["edges"]
        options = {"nodes": share} | ({} if edges == pruning["edges"] else {"edges": edges})
        flags = " ".join(f"--{name} {value:g}" for name, value in options.items())
        call = ", ".join(f"{name}={value:g}" for name, value in options.items())
        advice = (
            f"Try {flags} (`prune({call})` in Python), which shows {_count(then, 'feature')}, or train "
            "dictionaries for more layers."
        )
    return (
        f"No feature is strong enough for the page: the set {covered}, and {_count(dropped, 'feature')} together "
        f"{'has' if dropped == 1 else 'have'} {_percent(pruning['dropped_feature_influence'])} of the influence, too little for "
        f"a page with {_percent(pruning['nodes'])} of it. {advice}"
    )


def notes(graph: "AttributionGraph") -> list[str]:
    """Notes for the reader of a graph: why it has no features, and the notes that were made with it.

    Args:
        graph ([`AttributionGraph`]): The graph, pruned or not.

    Returns:
        `list[str]`: sentences.
    """
    return [*filter(None, [missing_features(graph)]), *graph.metadata.get("notes", ())]


def left_out(graph: "AttributionGraph") -> str | None:
    """A sentence on the nodes and edges that pruning dropped, with the share of influence that it kept; `None` if it was not pruned.

    Args:
        graph ([`AttributionGraph`]): The graph.

    Returns:
        `str` or `None`: sentences.
    """
    report = graph.metadata.get("pruning")
    if not report:
        return None
    nodes = graph.num_nodes + report["dropped_nodes"]
    text = (
        f"The page shows {graph.num_nodes:,} of {nodes:,} nodes, which have {_percent(1 - report['dropped_influence'])} of the "
        f"influence of all nodes"
    )
    # Graphs that were pruned by earlier versions lack these.
    if "dropped_edges" in report:
        edges = graph.num_edges + report["dropped_edges"]
        text += (
            f", and {graph.num_edges:,} of {edges:,} edges, which carry {_percent(1 - report['dropped_edge_influence'])} of the "
            "influence of all edges"
        )
    return (
        f"{text}. Not on the page are {_count(report['dropped_error_nodes'], 'error')} with "
        f"{_percent(report['dropped_error_influence'])} of the influence"
        + (
            f" and {_count(report['dropped_features'], 'feature')} with {_percent(report['dropped_feature_influence'])}."
            if "dropped_features" in report
            else "."
        )
    )


def _covers(graph):
    """How many layers the dictionaries write to, such as `covers 4 of 30 layers`."""
    known = graph.metadata.get("dictionaries") or ()
    sites = [str(entry.get("output_site") or entry.get("name")) for entry in known] or graph.dictionaries
    layers = {found[1] for found in map(_LAYER.search, sites) if found}
    return f"covers {len(layers)} of {graph.num_layers} layers"


def _count(number, word):
    return f"{number:,} {word}{'' if number == 1 else 's'}"


def _percent(share):
    """A share with two digits where it is small, such as `94%`, `4.2%` or `0.031%`."""
    value = 100 * share
    if value == 0 or abs(value) >= 9.95:
        # Neither 0% nor 100% where it is not all.
        return f"{value:.0f}%" if not 99.5 <= value < 100 else f"{value:.1f}%" if value < 99.95 else "over 99.9%"
    return f"{value:.2g}%" if abs(value) >= 0.001 else "under 0.001%"
