"""Find repairs of a task without given heads: search, judge on other prompts, and describe the heads."""

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Literal

from transformers import PreTrainedModel

from ...circuits.patching.patching import Patching
from ...errors import TranscoderError
from ...lm.wrappers import measures_model
from ...tasks.task import Task
from .downstream import DownstreamChange, downstream_change
from .forced_heads import ForcedAttention, ForcedHead, token_sets
from .head_evidence import HeadEvidence, head_evidence, with_first_token
from .judged_repairs import forced_predictions, judge_conditions, outcomes_of
from .repair import Outcome
from .repair_search import FoundRepair, RepairSearch, search_repair
from .repair_tables import repair_text
from .traced_tasks import TracedTasks


@dataclass(frozen=True)
class RepairStudy:
    """Repairs of a task that were found by search.

    Args:
        search ([`RepairSearch`]): The search, on its own prompts.
        outcomes (`dict[str, list[Outcome]]`): Name of the tokens of each repair -> outcomes on other prompts: without an edit
            (`"none"`), with the repair, and, for explained repairs, with parts of it and with controls.
        explained (`list[FoundRepair]`): The repairs with the highest scores, which have controls.
        heads (`list[HeadEvidence]`): What the heads of the explained repairs do without an edit.
        downstream (`dict[str, DownstreamChange]`): Tokens of each explained repair from `END` -> effects on later heads.
        in_ioi (`dict[str, list[Outcome]]`): Tokens of each explained repair -> outcomes on IOI with its heads forced onto each
            set of tokens there.
        protocol (`dict`): Settings.
    """

    search: RepairSearch
    outcomes: dict[str, list[Outcome]]
    explained: list[FoundRepair]
    heads: list[HeadEvidence]
    downstream: dict[str, DownstreamChange]
    in_ioi: dict[str, list[Outcome]]
    protocol: dict

    def to_dict(self) -> dict:
        """All numbers as JSON."""
        return {
            "protocol": self.protocol,
            "sets": {name: list(positions) for name, positions in self.search.sets.items()},
            "repairs": [asdict(repair) for repair in self.search.repairs],
            "alone": {name: table.tolist() for name, table in self.search.alone.items()},
            "outcomes": {tokens: [asdict(each) for each in found] for tokens, found in self.outcomes.items()},
            "explained": [repair.tokens for repair in self.explained],
            "heads": [asdict(each) for each in self.heads],
            "downstream": {tokens: change.to_dict() for tokens, change in self.downstream.items()},
            "in_ioi": {tokens: [asdict(each) for each in found] for tokens, found in self.in_ioi.items()},
        }

    def to_text(self) -> str:
        """The main numbers as text for a terminal."""
        return repair_text(self)

    __str__ = to_text


@measures_model
def find_repair(
    model: PreTrainedModel,
    task: Task,
    judged: Task,
    *,
    query: str = "END",
    tokens: Mapping[str, Sequence[str]] | None = None,
    layers: Iterable[int] | None = None,
    objective: Literal["accuracy", "candidate_accuracy"] = "accuracy",
    penalty: float = 1.0,
    max_heads: int = 4,
    shortlist: int = 32,
    beam: int = 3,
    explained: int = 3,
    head_draws: int = 10,
    token_draws: int = 5,
    traced: TracedTasks | None = None,
    seed: int = 0,
    batch_size: int | None = None,
    progress: bool = False,
) -> RepairStudy:
    """Search for heads that repair a task when their attention is forced onto other tokens, and judge the results.

    Heads are searched on one set of prompts ([`search_repair`]) and judged on another. The best repairs are compared with
    controls: equally many random heads of the same layers, and the same heads on the other tokens and on random tokens. An
    edit that uses the answer is a diagnostic of what the heads do, not a mitigation.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            A causal language model, which runs in evaluation mode.
        task ([`Task`]):
            The prompts of the search.
        judged ([`Task`]):
            Other prompts of the same task, of another seed. Those that are in `task` too are left out.
        query, tokens, layers, objective, penalty, max_heads, shortlist, beam, batch_size:
            The arguments of [`search_repair`].
        explained (`int`, *optional*, defaults to 3):
            Largest number of repairs that are compared with controls and whose heads are described.
        head_draws, token_draws (`int`, *optional*, default to 10 and 5):
            Largest number of random choices of heads, and number of random choices of tokens.
        traced ([`TracedTasks`], *optional*):
            Circuits of IOI and Colored Objects from [`trace_tasks`], for the roles of the heads and their effects in both tasks.
        seed (`int`, *optional*, defaults to 0):
            Seed for the random choices.
        progress (`bool`, *optional*, defaults to `False`):
            Whether to show progress bars.

    Returns:
        [`RepairStudy`]

    Raises:
        [`TranscoderError`]: all prompts of `judged` are in `task`, or an argument does not fit, as in [`search_repair`].
    """
    if min(explained, head_draws, token_draws) < 0:
        raise TranscoderError(
            "explained, head_draws and token_draws are numbers of things to measure: give 0 or more."
        )
    judged = unseen(judged, task)
    settings = {"batch_size": batch_size, "progress": progress}
    search = search_repair(
        model,
        task,
        query=query,
        tokens=tokens,
        layers=layers,
        objective=objective,
        penalty=penalty,
        max_heads=max_heads,
        shortlist=shortlist,
        beam=beam,
        **settings,
    )
    chosen = [repair for repair in search.repairs if repair.heads][:explained]
    # Controls attend to all sets of the task, whichever were searched.
    sets = token_sets(judged, query) | search.sets
    attention = ForcedAttention(judged, sets, query)
    outcomes = _judge(
        model, judged, attention, search.repairs, chosen, list(sets), head_draws, token_draws, seed, settings
    )
    heads = list(dict.fromkeys(each.head for repair in chosen for each in repair.heads))
    described = {task.name: (task, query, _positions(task, query))}
    for name, other in ({} if traced is None else traced.tasks).items():
        described.setdefault(name, (other, "END", _positions(other, "END")))
    return RepairStudy(
        search,
        outcomes,
        chosen,
        head_evidence(model, heads, described, traced, seed=seed) if heads else [],
        _downstream(model, task, query, search.sets, chosen, traced, seed, progress),
        {} if traced is None else _in_ioi(model, traced.tasks["ioi"], chosen, settings),
        {
            "model": model.config.name_or_path,
            "dtype": str(model.dtype).removeprefix("torch."),
            "task": task.name,
            "task_settings": task.settings,
            "judged_settings": judged.settings,
            "prompts": len(task),
            "judged_prompts": len(judged),
            "query": query,
            "objective": objective,
            "penalty": penalty,
            "max_heads": max_heads,
            "shortlist": shortlist,
            "beam": beam,
            "edits_tried": search.runs,
            "seed": seed,
            "intervals": "95%: Wilson for accuracies, bootstrap over prompts for path patching",
        },
    )


def unseen(judged: Task, task: Task) -> Task:
    """Select the prompts of a task that are not in another one.

    Raises:
        [`TranscoderError`]: there are none.
    """
    seen = set(map(tuple, task.dataset["clean_ids"]))
    rows = [row for row, ids in enumerate(judged.dataset["clean_ids"]) if tuple(ids) not in seen]
    if not rows:
        raise TranscoderError(
            "All prompts for judging are among those of the search: make them with another seed, or give more."
        )
    return judged.select(rows)


def _judge(model, judged, attention, repairs, chosen, sets, head_draws, token_draws, seed, settings):
    """Outcomes of each repair, by the name of its tokens, with controls if it is a chosen one."""
    generator = random.Random(seed)
    conditions = {}
    for repair in repairs:
        if repair in chosen:
            conditions[repair.tokens] = judge_conditions(
                model, attention, repair.heads, sets, head_draws, token_draws, generator
            )
        else:
            conditions[repair.tokens] = {"repair": repair.heads} if repair.heads else {}
    return _outcomes(model, judged, attention, conditions, settings)


def _outcomes(model, task, attention, conditions, settings):
    """Outcomes on a task without an edit and under named edits, by the tokens of each repair: rows of one forward pass."""
    rows = {("", "none"): []}
    rows |= {(tokens, name): heads for tokens, each in conditions.items() for name, heads in each.items()}
    found = forced_predictions(model, task, attention, rows, **settings)
    before = found["", "none"]
    return {
        tokens: outcomes_of(
            {"none": [], **each}, {"none": before, **{name: found[tokens, name] for name in each}}, before, task
        )
        for tokens, each in conditions.items()
    }


def _positions(task, query):
    """Names of the positions that the query token can attend to, the first token included."""
    return list(dict.fromkeys(name for names in token_sets(task, query).values() for name in names))


def _downstream(model, task, query, sets, chosen, traced, seed, progress):
    """Effects of each repair on later heads, if it starts from `END` and the prompts have wrong answers."""
    wrong = task.answers().wrong
    if query != "END" or not wrong.shape[1] or (wrong < 0).all(1).any() or not chosen:
        return {}
    importance = None
    if traced is not None and task.name in traced.stages:
        importance = traced.stages[task.name][0].result.effects
    elif task.has_corrupted:
        importance = Patching(model, task, progress=progress).paths("logits").effects
    attention = ForcedAttention(task, sets, query)
    named = with_first_token(task)
    return {
        repair.tokens: downstream_change(
            model, named, attention.edits(repair.heads), _positions(task, query), importance, seed=seed
        )
        for repair in chosen
    }


def _in_ioi(model, ioi, chosen, settings):
    """Outcomes on IOI with the heads of each repair forced onto each set of tokens there."""
    sets = token_sets(ioi)
    conditions = {
        repair.tokens: {
            f"same heads to {name}": [ForcedHead(each.head, name) for each in repair.heads] for name in sets
        }
        for repair in chosen
    }
    return _outcomes(model, ioi, ForcedAttention(ioi, sets), conditions, settings)
