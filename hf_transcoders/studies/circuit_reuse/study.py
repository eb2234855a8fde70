"""The whole study on one model: two tasks traced, their circuits compared, and the repair."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

from transformers import PreTrainedModel

from ...circuits.patching.attention_views import attention_views
from ...circuits.patching.faithfulness import Faithfulness, circuit_faithfulness
from ...circuits.patching.results import Head
from ...errors import TranscoderError
from ...lm.architectures import num_layers
from ...lm.attention import attention_modules, num_heads
from ...lm.wrappers import measures_model
from ...reports.sections import AttentionView
from ...tasks.answer_metrics import Estimate
from ...tasks.colored_objects import colored_objects
from ...tasks.ioi import indirect_object_identification
from ...tasks.measuring import measure
from .movers import MoverChange, mover_change
from .overlap import Overlap, overlaps
from .published_heads import Published, published_for
from .repair import Outcome, forced, repair_outcomes
from .roles import Roles, RoleTests, find_roles
from .stages import Stage, head_count, receiving_heads, strongest_heads, trace_stages


@dataclass(frozen=True)
class Repair:
    """The repair with one choice of heads.

    Args:
        selection (`str`): How the heads were chosen: `"role tests"`, `"path patching"` or `"published"`.
        inhibition, negative (`list[Head]`): The heads.
        outcomes (`list[Outcome]`): Under each edit; none where no head was found.
        movers ([`MoverChange`], *optional*): What the whole edit does to movers behind the edited heads.
    """

    selection: str
    inhibition: list[Head]
    negative: list[Head]
    outcomes: list[Outcome] = field(default_factory=list)
    movers: MoverChange | None = None

    def to_dict(self) -> dict:
        """Everything as JSON."""
        return {
            "selection": self.selection,
            "inhibition": [list(head) for head in self.inhibition],
            "negative": [list(head) for head in self.negative],
            "outcomes": [each.to_dict() for each in self.outcomes],
            "movers": None if self.movers is None else self.movers.to_dict(),
        }


@dataclass(frozen=True)
class CircuitReuse:
    """What the study found.

    Args:
        accuracy (`dict[str, dict[str, Estimate]]`): Task -> metrics of the clean prompts.
        stages (`dict[str, list[Stage]]`): Task -> what tracing found.
        overlaps (`list[Overlap]`): One for each threshold.
        roles ([`Roles`]): Heads by role.
        faithfulness (`dict[str, list[Faithfulness]]`): Task -> its own, the other's and random circuits.
        repairs (`list[Repair]`): One for each way to choose heads.
        published ([`Published`], *optional*): What the paper says of this model.
        protocol (`dict`): How everything was measured.
        attention (`list[AttentionView]`): Where the strongest heads look in the first prompt of each task.
    """

    accuracy: dict[str, dict[str, Estimate]]
    stages: dict[str, list[Stage]]
    overlaps: list[Overlap]
    roles: Roles
    faithfulness: dict[str, list[Faithfulness]]
    repairs: list[Repair]
    published: Published | None
    protocol: dict
    attention: list[AttentionView] = field(default_factory=list)

    def to_dict(self) -> dict:
        """Every number as JSON, those of each prompt in path patching left out."""
        return {
            "protocol": self.protocol,
            "accuracy": {
                task: {name: each.to_dict() for name, each in metrics.items()}
                for task, metrics in self.accuracy.items()
            },
            "stages": {task: [stage_to_dict(stage) for stage in stages] for task, stages in self.stages.items()},
            "overlaps": [each.to_dict() for each in self.overlaps],
            "roles": self.roles.to_dict(),
            "faithfulness": {task: [each.to_dict() for each in found] for task, found in self.faithfulness.items()},
            "repairs": [each.to_dict() for each in self.repairs],
            "published": None
            if self.published is None
            else {
                "source": self.published.source,
                "heads": {role: [list(head) for head in heads] for role, heads in self.published.heads.items()},
                "figures": self.published.figures,
                "footnotes": self.published.footnotes,
            },
        }


def stage_to_dict(stage: Stage) -> dict:
    """Effects and intervals of a stage as JSON."""
    low, high = stage.result.intervals()
    return {
        "stage": stage.name,
        "receivers": stage.receivers,
        "position": stage.position,
        "effects": stage.result.effects.tolist(),
        "low": low.tolist(),
        "high": high.tolist(),
        "protocol": stage.result.protocol,
    }


@measures_model
def reuse_circuit(
    base: PreTrainedModel,
    tokenizer,
    *,
    prompts: int = 64,
    repair_prompts: int = 200,
    faithfulness_prompts: int = 32,
    shares: Sequence[float] = (0.01, 0.02, 0.05, 0.10),
    circuit_shares: Sequence[float] = (0.02, 0.10),
    random_circuits: int = 3,
    tests: RoleTests | None = None,
    add_bos: bool | None = None,
    seed: int = 0,
    batch_size: int = 32,
    progress: bool = False,
) -> CircuitReuse:
    """Ask whether a model uses the same heads for indirect objects (IOI) and for Colored Objects, and repair the latter.

    Heads are chosen on the first prompts; the repair is measured on others, drawn with another seed.

    Args:
        base ([`~transformers.PreTrainedModel`]):
            A causal language model, which runs in evaluation mode.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Its tokenizer.
        prompts (`int`, *optional*, defaults to 64):
            Prompts of each task for tracing and role tests.
        repair_prompts (`int`, *optional*, defaults to 200):
            Prompts of Colored Objects for the repair.
        faithfulness_prompts (`int`, *optional*, defaults to 32):
            Prompts of each task for faithfulness; 0 leaves it out.
        shares (`Sequence[float]`, *optional*):
            Shares of heads at which overlap is counted.
        circuit_shares (`Sequence[float]`, *optional*):
            Shares of heads of each stage that make a circuit, for faithfulness.
        random_circuits (`int`, *optional*, defaults to 3):
            Random circuits of the size of the other task's, for comparison.
        tests ([`RoleTests`], *optional*):
            Thresholds of the role tests.
        add_bos (`bool`, *optional*):
            Whether prompts begin with the beginning-of-sequence token; by default as the tokenizer does.
        seed (`int`, *optional*, defaults to 0):
            Of prompts and everything random.
        batch_size (`int`, *optional*, defaults to 32):
            Prompts of one forward; patching estimates its own batches from the memory.
        progress (`bool`, *optional*, defaults to `False`):
            Whether to show progress bars.

    Returns:
        [`CircuitReuse`]

    Raises:
        [`TranscoderError`]: the tokenizer cannot express the tasks, or the model's attention cannot be edited.

    Source: [Circuit Component Reuse Across Tasks in Transformer Language Models](https://arxiv.org/abs/2310.08744).
    """
    if min(prompts, repair_prompts) < 2 or faithfulness_prompts < 0:
        raise TranscoderError("Intervals need prompts: give at least two for tracing and two for the repair.")
    attention_modules(base)
    ioi = indirect_object_identification(tokenizer, prompts, "s2_io_flip", seed=seed, add_bos=add_bos)
    colors = colored_objects(tokenizer, prompts, seed=seed, add_bos=add_bos)
    test_colors = colored_objects(tokenizer, repair_prompts, seed=seed + 1, add_bos=add_bos)
    tasks = {"ioi": ioi, "colored-objects": colors}
    accuracy = {
        name: measure(base, task, batch_size, seed=seed, progress=progress)["clean"] for name, task in tasks.items()
    }
    stages = {name: trace_stages(base, task, progress=progress) for name, task in tasks.items()}
    by_name = {name: {stage.name: stage.result for stage in found} for name, found in stages.items()}
    first_ids = ioi.dataset[0]["clean_ids"]
    bos = tokenizer.bos_token_id if first_ids[0] == tokenizer.bos_token_id else None
    roles = find_roles(base, ioi, stages["ioi"], colors, stages["colored-objects"], tests, bos, seed)

    faithfulness = {}
    if faithfulness_prompts:
        kept = {
            "ioi": indirect_object_identification(
                tokenizer, faithfulness_prompts, "abc", templates="baba", seed=seed, add_bos=add_bos
            ),
            "colored-objects": colored_objects(tokenizer, faithfulness_prompts, seed=seed, add_bos=add_bos),
        }
        circuits = _circuits(stages, circuit_shares, random_circuits, base, seed)
        faithfulness = {
            name: circuit_faithfulness(base, task, circuits[name], seed, progress=progress)
            for name, task in kept.items()
        }

    published = published_for(base.config.name_or_path)
    logits = stages["colored-objects"][0].result
    repairs = []
    for selection, inhibition, negative in _selections(stages["ioi"], roles, published):
        outcomes, change = [], None
        if inhibition or negative:
            outcomes = repair_outcomes(
                base, test_colors, inhibition, negative, seed=seed, batch_size=batch_size, progress=progress
            )
            movers = published.heads["mover"] if selection == "published" else receiving_heads(logits, 0.02)
            part = test_colors.select(range(min(prompts, repair_prompts)))
            edit = forced(part, list(dict.fromkeys([*inhibition, *negative])))
            change = mover_change(base, part, edit, movers, logits.effects, batch_size, seed)
        repairs.append(Repair(selection, inhibition, negative, outcomes, change))
    protocol = {
        "model": base.config.name_or_path,
        "dtype": str(base.dtype).removeprefix("torch."),
        "layers": num_layers(base),
        "heads": num_heads(base)[0],
        "key_value_heads": num_heads(base)[1],
        "prompts": prompts,
        "repair_prompts": repair_prompts,
        "faithfulness_prompts": faithfulness_prompts,
        "seed": seed,
        "repair_seed": seed + 1,
        "begins_with_bos": bos is not None,
        "ioi_corruption": "s2_io_flip (tracing), abc (faithfulness)",
        "colored_objects_corruption": "other_object",
        "receivers": "the strongest 2% of heads with a positive effect, at least three",
        "accuracy": "argmax of the full vocabulary",
        "intervals": "95%: Wilson for accuracies, bootstrap over prompts for the rest",
        "ablation": "mean over corrupted prompts of the same template and length (faithfulness)",
    }
    return CircuitReuse(
        accuracy,
        stages,
        overlaps(by_name["ioi"], by_name["colored-objects"], shares, seed=seed),
        roles,
        faithfulness,
        repairs,
        published,
        protocol,
        [
            view
            for task in tasks.values()
            for view in attention_views(base, tokenizer, task, _shown(repairs, stages, roles))
        ],
    )


def circuit_of(stages: Sequence[Stage], share: float) -> list[Head]:
    """The heads that are among the strongest share in any stage."""
    found = [
        strongest_heads(stage.result.effects, head_count(share, stage.result.effects.numel())) for stage in stages
    ]
    return sorted({head for heads in found for head in heads})


def _shown(repairs, stages, roles):
    """The heads whose attention is shown: the strongest on the logits, the strongest mover and edited heads."""
    chosen = next((repair for repair in repairs if repair.outcomes), None)
    shown = dict.fromkeys(receiving_heads(stages["ioi"][0].result, 0.0)[:1], "strongest on the logits")
    shown |= dict.fromkeys(roles.heads["mover"][:1], "mover")
    if chosen is not None:
        shown |= dict.fromkeys(chosen.inhibition[:1], "inhibition head")
        shown |= dict.fromkeys(chosen.negative[:1], "negative mover")
    return shown


def _circuits(stages, shares, draws, base, seed):
    """For each task, named circuits: its own, the other's, and random ones of the other's size."""
    everything = [(layer, head) for layer in range(num_layers(base)) for head in range(num_heads(base)[0])]
    generator = random.Random(seed)
    found = {}
    for name, other in (("ioi", "colored-objects"), ("colored-objects", "ioi")):
        circuits = found.setdefault(name, {})
        for share in shares:
            own, theirs = circuit_of(stages[name], share), circuit_of(stages[other], share)
            circuits[f"own, top {share:.0%}"] = own
            circuits[f"other task's, top {share:.0%}"] = theirs
            for draw in range(draws):
                circuits[f"random {draw + 1}, top {share:.0%}"] = generator.sample(everything, len(theirs))
    return found


def _selections(ioi_stages, roles, published):
    """How the edited heads are chosen: by all tests, by path patching alone (as many as in the paper), or as published."""
    yield "role tests", roles.heads["inhibition"], roles.heads["negative mover"]
    logits = ioi_stages[0].result.effects
    inhibition = receiving_heads(ioi_stages[1].result, 0.0)[:3] if len(ioi_stages) > 1 else []
    lowest = logits.flatten().argmin().item()
    negative = [divmod(lowest, logits.shape[1])] if logits.flatten()[lowest] < 0 else []
    yield "path patching", inhibition, negative
    if published is not None:
        yield "published", published.heads["inhibition"], published.heads["negative mover"]
