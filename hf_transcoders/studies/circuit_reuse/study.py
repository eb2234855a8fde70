"""The study of circuit reuse on one model: trace two tasks, compare their circuits, and repair one of them."""

import itertools
import random
from collections.abc import Sequence

from transformers import PreTrainedModel

from ...circuits.patching.attention_views import attention_views
from ...circuits.patching.faithfulness import circuit_faithfulness
from ...circuits.patching.results import Head
from ...errors import TranscoderError
from ...lm.architectures import num_layers
from ...lm.attention import attention_modules, num_heads
from ...lm.wrappers import measures_model
from ...tasks.colored_objects import colored_objects
from ...tasks.ioi import indirect_object_identification
from ...tasks.performance import task_performance
from .found_repair import find_repair
from .movers import mover_change
from .overlap import overlaps
from .published_heads import published_for
from .repair import WRONG_COLORS, forced, repair_outcomes
from .reuse_results import CircuitReuse, Repair
from .roles import RoleTests
from .stages import Stage, head_count, receiving_heads, strongest_heads
from .traced_tasks import trace_tasks


@measures_model
def reuse_circuit(
    model: PreTrainedModel,
    tokenizer,
    *,
    prompts: int = 64,
    repair_prompts: int = 200,
    faithfulness_prompts: int = 32,
    search_prompts: int = 64,
    shares: Sequence[float] = (0.01, 0.02, 0.05, 0.10),
    circuit_shares: Sequence[float] = (0.02, 0.10),
    random_circuits: int = 3,
    tests: RoleTests | None = None,
    add_bos: bool | None = None,
    seed: int = 0,
    batch_size: int = 32,
    progress: bool = False,
) -> CircuitReuse:
    """Compare the heads that a model uses for indirect objects (IOI) and for Colored Objects, and repair the latter.

    Heads are selected on one set of prompts; the repair is measured on others, drawn with another seed.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            A causal language model, which runs in evaluation mode.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            The tokenizer of the model.
        prompts (`int`, *optional*, defaults to 64):
            Number of prompts of each task for tracing and role tests.
        repair_prompts (`int`, *optional*, defaults to 200):
            Number of prompts of Colored Objects for the repair.
        faithfulness_prompts (`int`, *optional*, defaults to 32):
            Number of prompts of each task for faithfulness; 0 skips it.
        search_prompts (`int`, *optional*, defaults to 64):
            Number of prompts of Colored Objects on which heads for the repair are searched ([`find_repair`]); 0 skips it.
        shares (`Sequence[float]`, *optional*):
            Thresholds of the overlap, as shares of heads.
        circuit_shares (`Sequence[float]`, *optional*):
            Shares of heads of each stage in a circuit, for faithfulness.
        random_circuits (`int`, *optional*, defaults to 3):
            Number of random circuits of the size of the other task's circuit, for faithfulness.
        tests ([`RoleTests`], *optional*):
            Thresholds of the role tests.
        add_bos (`bool`, *optional*):
            Whether prompts begin with the beginning-of-sequence token. The default is that of the tokenizer.
        seed (`int`, *optional*, defaults to 0):
            Seed for the prompts and all random choices.
        batch_size (`int`, *optional*, defaults to 32):
            Number of prompts in one forward pass. Patching chooses its batches by the memory instead.
        progress (`bool`, *optional*, defaults to `False`):
            Whether to show progress bars.

    Returns:
        [`CircuitReuse`]

    Raises:
        [`TranscoderError`]: the tokenizer splits words of the tasks, or the model's attention cannot be edited.

    Source: [Circuit Component Reuse Across Tasks in Transformer Language Models](https://arxiv.org/abs/2310.08744).
    """
    if min(prompts, repair_prompts) < 2 or min(faithfulness_prompts, search_prompts) < 0:
        raise TranscoderError("Intervals need at least two prompts for tracing and two for the repair: give more.")
    attention_modules(model)
    traced = trace_tasks(model, tokenizer, prompts, tests=tests, add_bos=add_bos, seed=seed, progress=progress)
    tasks, stages, roles = traced.tasks, traced.stages, traced.roles
    test_colors = colored_objects(tokenizer, repair_prompts, seed=seed + 1, add_bos=add_bos)
    performances = {
        name: task_performance(model, task, batch_size, seed=seed, progress=progress) for name, task in tasks.items()
    }
    accuracy = {name: found.measured["clean"] for name, found in performances.items()}
    by_name = {name: {stage.name: stage.result for stage in found} for name, found in stages.items()}

    faithfulness = {}
    if faithfulness_prompts:
        kept = {
            "ioi": indirect_object_identification(
                tokenizer, faithfulness_prompts, "abc", templates="baba", seed=seed, add_bos=add_bos
            ),
            "colored-objects": colored_objects(tokenizer, faithfulness_prompts, seed=seed, add_bos=add_bos),
        }
        circuits = _circuits(stages, circuit_shares, random_circuits, model, seed)
        faithfulness = {
            name: circuit_faithfulness(model, task, circuits[name], seed, progress=progress)
            for name, task in kept.items()
        }

    published = published_for(model.config.name_or_path)
    logits = stages["colored-objects"][0].result
    repairs = []
    for selection, inhibition, negative in _selections(stages["ioi"], roles, published):
        outcomes, change = [], None
        if inhibition or negative:
            outcomes = repair_outcomes(
                model, test_colors, inhibition, negative, seed=seed, batch_size=batch_size, progress=progress
            )
            movers = published.heads["mover"] if selection == "published" else receiving_heads(logits, 0.02)
            part = test_colors.select(range(min(prompts, repair_prompts)))
            edit = forced(part, list(dict.fromkeys([*inhibition, *negative])))
            change = mover_change(model, part, edit, movers, logits.effects, batch_size, seed)
        repairs.append(Repair(selection, inhibition, negative, outcomes, change))
    search = None
    if search_prompts:
        search = find_repair(
            model,
            colored_objects(tokenizer, search_prompts, seed=seed, add_bos=add_bos),
            test_colors,
            tokens={"wrong_colour": WRONG_COLORS},
            traced=traced,
            seed=seed,
            progress=progress,
        )
    protocol = {
        "model": model.config.name_or_path,
        "dtype": str(model.dtype).removeprefix("torch."),
        "layers": num_layers(model),
        "heads": num_heads(model)[0],
        "key_value_heads": num_heads(model)[1],
        "prompts": prompts,
        "repair_prompts": repair_prompts,
        "faithfulness_prompts": faithfulness_prompts,
        "search_prompts": search_prompts,
        "seed": seed,
        "repair_seed": seed + 1,
        "begins_with_bos": traced.begins_with_bos,
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
        search,
        protocol,
        [
            view
            for task in tasks.values()
            for view in attention_views(model, tokenizer, task, _shown(repairs, stages, roles))
        ],
        [found.warning for found in performances.values() if found.warning],
    )


def circuit_of(stages: Sequence[Stage], share: float) -> list[Head]:
    """Make a circuit of the heads that are among the strongest share in any stage."""
    found = [
        strongest_heads(stage.result.effects, head_count(share, stage.result.effects.numel())) for stage in stages
    ]
    return sorted({head for heads in found for head in heads})


def _shown(repairs, stages, roles):
    """Choose heads whose attention is shown: the strongest on the logits, the strongest mover and edited heads."""
    chosen = next((repair for repair in repairs if repair.outcomes), None)
    shown = dict.fromkeys(receiving_heads(stages["ioi"][0].result, 0.0)[:1], "strongest on the logits")
    shown |= dict.fromkeys(roles.heads["mover"][:1], "mover")
    if chosen is not None:
        shown |= dict.fromkeys(chosen.inhibition[:1], "inhibition head")
        shown |= dict.fromkeys(chosen.negative[:1], "negative mover")
    return shown


def _circuits(stages, shares, draws, model, seed):
    """Make circuits for each task: its own, the circuit of the other task, and random ones of the same size."""
    everything = list(itertools.product(range(num_layers(model)), range(num_heads(model)[0])))
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
    """Select the heads to edit: by role tests, by path patching alone (as many as in the paper), or as published."""
    yield "role tests", roles.heads["inhibition"], roles.heads["negative mover"]
    logits = ioi_stages[0].result.effects
    inhibition = receiving_heads(ioi_stages[1].result, 0.0)[:3] if len(ioi_stages) > 1 else []
    lowest = logits.flatten().argmin().item()
    negative = [divmod(lowest, logits.shape[1])] if logits.flatten()[lowest] < 0 else []
    yield "path patching", inhibition, negative
    if published is not None:
        yield "published", published.heads["inhibition"], published.heads["negative mover"]
