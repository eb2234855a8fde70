"""How much of a task is left when only a circuit's heads keep what they read: its own circuit, another's, random ones."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from transformers import PreTrainedModel

from ...lm.architectures import num_layers
from ...lm.attention import num_heads
from ...lm.wrappers import measures_model
from ...tasks.task import Task
from .patch_plan import PatchPlan
from .patching import Patching
from .results import Head


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

    def to_dict(self) -> dict:
        """Its fields as JSON."""
        return asdict(self)


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
    everything = [(layer, head) for layer in range(num_layers(model)) for head in range(num_heads(model)[0])]
    kept = {"whole model": set(everything), "no head": set(), **{name: set(each) for name, each in circuits.items()}}
    patching = Patching(model, task, ablation="mean", metric="logit_difference", **settings)
    rows = [
        [f"layers.{layer}.attn.head.{head}.z" for layer, head in everything if (layer, head) not in each]
        for each in kept.values()
    ]
    plan = PatchPlan.from_sites(rows, patching.position("all"))
    values = patching.run(plan).values.double()
    whole, nothing = values[0], values[1]
    generator = torch.Generator().manual_seed(seed)
    draws = torch.randint(values.shape[1], (1000, values.shape[1]), generator=generator)
    ends = torch.tensor([0.025, 0.975], dtype=torch.float64)
    found = []
    for (name, heads), each in zip(kept.items(), values, strict=True):
        drawn = (each - nothing)[draws].mean(1) / (whole - nothing)[draws].mean(1)
        low, high = drawn.quantile(ends).tolist()
        value = ((each - nothing).mean() / (whole - nothing).mean()).item()
        ends_of_difference = each[draws].mean(1).quantile(ends).tolist()
        found.append(Faithfulness(name, len(heads), value, low, high, each.mean().item(), *ends_of_difference))
    return found
