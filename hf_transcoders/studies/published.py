"""Published figures of the case studies of Dunefsky et al. (2024), which apply to one set of transcoders.

Source: [Transcoders Find Interpretable LLM Feature Circuits](https://arxiv.org/abs/2406.11944), and the notebooks
`greaterthan.ipynb` and `walkthrough.ipynb` released with it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from ..reports.sections import Table


_MODELS = ("gpt2", "openai-community/gpt2")
_TRANSCODERS = "pchlenski/gpt2-transcoders"


@dataclass(frozen=True)
class PublishedStudy:
    """
    Published figures of a study.

    Args:
        source (`str`): Paper and notebook with the figures.
        figures (`Mapping[str, float]`): Name of a figure -> published value.
        footnotes (`list[str]`): Settings and contradictions of the source.
        add_bos (`bool`): Whether its prompts begin with the beginning-of-sequence token.
        skip_first (`int`): Number of positions at the start that it leaves unchanged.
        layer (`int`, *optional*): Layer that it replaces, for figures of one layer.
    """

    source: str
    figures: Mapping[str, float]
    footnotes: list[str] = field(default_factory=list)
    add_bos: bool = True
    skip_first: int = 0
    layer: int | None = None


GREATER_THAN = PublishedStudy(
    source="Dunefsky, Chlenski and Nanda (2024), arXiv 2406.11944, greaterthan.ipynb",
    figures={
        "original": 0.8829,
        "transcoder": 0.7978,
        "without 5315": 0.8453,
        "20 features": 0.8435,
        "21 features": 0.8433,
        "22 features": 0.8314,
        "23 features": 0.7852,
        "24 features": 0.7862,
        "crossing": 24,
    },
    footnotes=[
        "Feature 5315 is the 24th by variance in the text of the paper and the 23rd in its notebook, where the score drops from "
        "22 to 23 features.",
        "The last token is at position 8 of its paths, so the prompts of the notebook begin with the beginning-of-sequence "
        "token; every position is changed.",
        "The endings are the 100 two-digit tokens; scores are means over the years 1701 to 1798.",
    ],
    layer=10,
)

REPLACEMENT = PublishedStudy(
    source="Dunefsky, Chlenski and Nanda (2024), arXiv 2406.11944, walkthrough.ipynb",
    figures={
        "ce_original": 3.5928,
        "all ce": 4.2337,
        "all kl": 0.6684,
        "inner ce": 4.0624,
        "inner ce zero": 10.9406,
    },
    footnotes=[
        "The text says that all MLPs are replaced, but the cell loads layers 0 to 10: compare both rows.",
        "The zero-ablated loss of 10.9406 applies to the layers between the first and the last.",
        "Measured on 100 batches of 128 x 128 tokens of OpenWebText, with every position replaced: other text gives other numbers.",
    ],
)


def published_study(study: PublishedStudy, base_model: str | None, transcoders: str | None) -> PublishedStudy | None:
    """
    Return the published figures that apply to a model and its transcoders, which are recognized by their names.

    Args:
        study ([`PublishedStudy`]): Published figures.
        base_model (`str`, *optional*): Hub id of the language model.
        transcoders (`str`, *optional*): Repo of the transcoders, or a folder that ends in its name.

    Returns:
        [`PublishedStudy`]: The figures, or `None` if they do not apply.
    """
    name = (transcoders or "").replace("\\", "/").rstrip("/")
    ours = name == _TRANSCODERS or name.endswith("/" + _TRANSCODERS)
    return study if ours and base_model in _MODELS else None


def published_figure(paper: PublishedStudy | None, key: str) -> str:
    """Format a published figure, or return an empty text if there is none."""
    value = None if paper is None else paper.figures.get(key)
    return "" if value is None else f"{value:g}"


def with_published(title: str, headers: list[str], rows: list[list], note: str, paper: PublishedStudy | None) -> Table:
    """Make a table whose last column holds published figures; without a paper, that column is left out."""
    if paper is None:
        return Table(title, headers, [row[:-1] for row in rows], note)
    notes = " ".join(f"({number}) {each}" for number, each in enumerate(paper.footnotes, 1))
    return Table(title, [*headers, "paper"], rows, f"{note}\nPaper: {paper.source}. {notes}")
