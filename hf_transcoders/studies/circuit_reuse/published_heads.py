"""Published heads and figures of the paper's model.

Source: Merullo, Eickhoff and Pavlick (2024), [Circuit Component Reuse Across Tasks in Transformer Language
Models](https://arxiv.org/abs/2310.08744).
"""

from dataclasses import dataclass, field

from ...circuits.patching.results import Head


@dataclass(frozen=True)
class Published:
    """Published results on a model.

    Args:
        source (`str`): The paper.
        heads (`dict[str, list[Head]]`): Role -> heads.
        figures (`dict[str, str]`): Name of a number here -> the figure in the paper.
        footnotes (`list[str]`): Notes on contradictions and gaps in the paper.
    """

    source: str
    heads: dict[str, list[Head]]
    figures: dict[str, str] = field(default_factory=dict)
    footnotes: list[str] = field(default_factory=list)


GPT2_MEDIUM = Published(
    source="Merullo, Eickhoff and Pavlick (2024), arXiv 2310.08744",
    heads={
        "mover": [(15, 14), (16, 15), (17, 4), (18, 5), (19, 15)],
        "negative mover": [(19, 1)],
        "inhibition": [(12, 3), (13, 4), (13, 13)],
        "content gatherer": [(11, 6), (11, 7), (12, 15)],
        "induction": [(9, 3)],
        "duplicate token": [(6, 4)],
    },
    figures={
        "accuracy, colored-objects": "49.6%",
        "none": "49.6%",
        "inhibition + negative mover": "93.7%",
        "inhibition alone": "81.5%",
        "negative mover alone": "78.1%",
        "overlap at 2%": "78% (25 of 32)",
        "attention to wrong colours": "-8.7%",
        "attention to the right colour": "+2.7%",
        "logit attribution": "about 3 times",
        "spearman": "0.69 (p < 0.01)",
    },
    footnotes=[
        "The third inhibition head is 13.13 in section 5 and appendix C.3, and 13.14 in appendix B.3 and figure 6; 13.13 is "
        "used here.",
        "The accuracy before the repair is 49.6% in sections 2.1 and 5, and 49.7% in one sentence.",
        "14.14 is called a mover in only one source and is left out.",
        "The paper's prompts, stages and head lists were not released in full: the stages here are our reading, and the paper "
        "uses 1,000 prompts of its own.",
        "The paper found no new mistakes with the whole edit.",
        "The overlap is given at one threshold, without a null or an interval.",
    ],
)

_OF_MODEL = {"openai-community/gpt2-medium": GPT2_MEDIUM, "gpt2-medium": GPT2_MEDIUM}


def published_for(name: str) -> Published | None:
    """The published results on a model by its name on the Hub, or `None`."""
    return _OF_MODEL.get(name)
