"""The card of a published attribution graph."""

from typing import TYPE_CHECKING

from huggingface_hub import ModelCardData

from ...hub_ids import is_hub_id
from ...text.markdown import code, escape, table
from .edge_validation import HELD_FIXED
from .verdicts import graph_verdicts, left_out, notes


if TYPE_CHECKING:
    from .graph import AttributionGraph


def graph_card(graph: "AttributionGraph", repo_id: str, subfolder: str = "", strongest: int = 10) -> str:
    """The README.md of a graph: its targets, its scores and validation, and how to open it.

    Args:
        graph ([`AttributionGraph`]): The graph.
        repo_id (`str`): Repo in which the graph is published.
        subfolder (`str`, *optional*, defaults to `""`): Folder in the repo.
        strongest (`int`, *optional*, defaults to 10): Number of features to list.

    Returns:
        `str`: Markdown with metadata.
    """
    facts = graph.metadata
    model = facts.get("model")
    metadata = ModelCardData(
        library_name="hf_transcoders",
        base_model=model if is_hub_id(model) else None,
        tags=["hf_transcoders", "attribution-graph", "mechanistic-interpretability"],
    )
    scores = graph.whole_scores
    where = f'"{repo_id}"' + (f', subfolder="{subfolder}"' if subfolder else "")
    parts = [
        f"---\n{metadata.to_yaml()}\n---",
        "# Attribution graph",
        f"Direct effects of features, tokens and errors on the predictions of {escape(model or 'a language model')} after this "
        f"prompt, with {len(graph.dictionaries)} dictionaries. Attention patterns and norm scales are frozen; each edge is the direct "
        "effect of one node on another.",
        code("".join(graph.tokens)),
        table(
            ["target", "probability"],
            [
                [code(target.label), "-" if target.probability is None else f"{target.probability:.1%}"]
                for target in graph.targets
            ],
        ),
        "Open `graph.html` in a browser to explore the graph, or load it:",
        f"```python\nfrom hf_transcoders.circuits.graphs import AttributionGraph\n\n"
        f"graph = AttributionGraph.from_pretrained({where})\n```",
        "## Scores and validation",
        *([f"> [!WARNING]\n> {escape(graph.warning)}"] if graph.warning else []),
        *(f"**{verdict.about.capitalize()}: {verdict.level}.** {escape(verdict.text)}" for verdict in graph_verdicts(graph)),
        table(["", ""], [
            ["nodes", f"{graph.num_nodes:,}"],
            ["edges", f"{graph.num_edges:,}"],
            ["replacement score", f"{scores['replacement']:.3f}"],
            ["completeness score", f"{scores['completeness']:.3f}"],
            ["influence that is not in the graph", f"{scores['rest']:.1%}"],
        ]),
        *_validation(facts.get("certificate")),
        *(escape(text) for text in (left_out(graph), *notes(graph)) if text),
        "## Strongest features",
        table(
            ["feature", "activation", "influence"],
            [
                [graph.label(number), f"{float(graph.value[number]):.3g}", f"{influence:.3f}"]
                for number, influence in graph.strongest_features(strongest)
            ],
        ),
    ]  # fmt: skip
    return "\n\n".join(parts) + "\n"


def _validation(summary):
    if not summary:
        return []
    return [
        "Features were ablated in the model, and the measured changes compared with the predictions of their edges:",
        table(
            ["held fixed", "edges", "correlation", "same sign", "relative error"],
            [
                [
                    HELD_FIXED.get(mode, mode),
                    entry["edges"],
                    f"{entry['pearson']:.3f}",
                    f"{entry['sign_agreement']:.1%}",
                    f"{entry['relative_error']:.2g}",
                ]
                for mode, entry in summary.items()
            ],
        ),
    ]
