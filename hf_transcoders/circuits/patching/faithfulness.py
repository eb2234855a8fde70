"""How much of a task is left when only a circuit's heads keep what they read: its own circuit, another's, random ones."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from ...lm.architectures import num_layers
from ...lm.attention import num_heads
from ...lm.wrappers import measures_model
from ...tasks.task import Task
from .patch_plan import PatchPlan
from .patching import Patching
from .results import Head, bootstrap_weights


@dataclass(frozen=True)
class Faithfulness:
    """What a circuit keeps of a task: `(circuit - nothing) / (model - nothing)` of mean logit differences.

    Args:
        circuit (`str`): Which circuit.
        heads (`int`): How many heads it has.
        value (`float`): 1 is the whole model, 0 is all heads ablated.
        low, high (`float`): Bootstrap interval over prompts.
        difference (`float`): Mean logit difference, in nats.
        difference_low, difference_high (`float`): Its bootstrap interval.
    """

    circuit: str
    heads: int
    value: float
    low: float
    high: float
    difference: float
    difference_low: float
    difference_high: float


@measures_model
def circuit_faithfulness(
    model: PreTrainedModel, task: Task, circuits: dict[str, Sequence[Head]], seed: int = 0, **settings
) -> list[Faithfulness]:
    """Keep the heads of a circuit and hold all others, at every token, at their mean over prompts of the same template.

    MLPs are kept. Means are of the corrupted prompts of the same template and length.

    Args:
        model ([`~transformers.PreTrainedModel`]): A causal language model, which runs in evaluation mode.
        task ([`Task`]): Prompts with corrupted ones.
        circuits (`dict[str, Sequence[Head]]`): Name -> layer and head of each head of a circuit.
        seed (`int`, *optional*, defaults to 0): Of the bootstrap.
        settings: `batch_size`, `max_memory` and `progress` of [`Patching`].

    Returns:
        `list[Faithfulness]`: first those of the whole model and of no head, then each circuit.
    """
    everything = list(itertools.product(range(num_layers(model)), range(num_heads(model)[0])))
    kept = {"whole model": set(everything), "no head": set(), **{name: set(each) for name, each in circuits.items()}}
    patching = Patching(model, task, ablation="mean", metric="logit_difference", **settings)
    rows = [
        [f"layers.{layer}.attn.head.{head}.z" for layer, head in everything if (layer, head) not in each]
        for each in kept.values()
    ]
    plan = PatchPlan.from_sites(rows, patching.position("all"))
    values = patching.run(plan).values.double()
    weights = bootstrap_weights(values.shape[1], 1000, torch.Generator().manual_seed(seed))
    ends = torch.tensor([0.025, 0.975], dtype=torch.float64)
    differences, drawn = values.mean(1), values @ weights.T
    shares, drawn_shares = (_share(each) for each in (differences, drawn))
    return [
        Faithfulness(
            name,
            len(heads),
            shares[row].item(),
            *drawn_shares[row].quantile(ends).tolist(),
            differences[row].item(),
            *drawn[row].quantile(ends).tolist(),
        )
        for row, (name, heads) in enumerate(kept.items())
    ]


def _share(differences):
    """Shares of the way from no head, the second row, to the whole model, the first row."""
    whole, nothing = differences[:2]
    return (differences - nothing) / (whole - nothing)
