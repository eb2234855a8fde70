"""Faithfulness of circuits: task performance when all heads outside a circuit are ablated."""

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
    """Faithfulness of one circuit: `(circuit - nothing) / (model - nothing)` of mean logit differences.

    Args:
        circuit (`str`): Name of the circuit.
        heads (`int`): Number of heads in the circuit.
        value (`float`): Faithfulness; 1 is the whole model and 0 is the model with all heads ablated.
        low, high (`float`): Bootstrap interval of the faithfulness over prompts.
        difference (`float`): Mean logit difference, in nats.
        difference_low, difference_high (`float`): Bootstrap interval of the logit difference.
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
    """Measure how much of a task circuits of heads preserve when all other heads are mean-ablated.

    Heads outside the circuit are set to their mean over the corrupted prompts of the same template and length, at every
    token. MLPs are not ablated.

    Args:
        model ([`~transformers.PreTrainedModel`]): A causal language model, which runs in evaluation mode.
        task ([`Task`]): Clean and corrupted prompts.
        circuits (`dict[str, Sequence[Head]]`): Name of each circuit -> layer and number of its heads.
        seed (`int`, *optional*, defaults to 0): Seed for the bootstrap resamples.
        settings: `batch_size`, `max_memory` and `progress` of [`Patching`].

    Returns:
        `list[Faithfulness]`: the whole model, no head, and then each circuit.
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
            differences[row].item(),  # pyright: ignore[reportCallIssue]
            *drawn[row].quantile(ends).tolist(),
        )
        for row, (name, heads) in enumerate(kept.items())
    ]


def _share(differences):
    """Shares of the way from no head, the second row, to the whole model, the first row."""
    whole, nothing = differences[:2]
    return (differences - nothing) / (whole - nothing)
