"""Search for the heads whose attention, forced onto other tokens, repairs a task."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from transformers import PreTrainedModel

from ...circuits.patching.attention_edits import check_heads
from ...circuits.patching.engine import PatchEngine
from ...circuits.patching.right_answers import RightAnswers, split_right
from ...errors import TranscoderError
from ...lm.architectures import num_layers
from ...lm.attention import num_heads
from ...lm.wrappers import measures_model
from ...tasks.task import Task
from .forced_heads import ForcedAttention, ForcedHead, token_sets


OBJECTIVES = ("accuracy", "candidate_accuracy")
#: Name of the repair in which each head attends to any of the sets of tokens.
ANY_TOKENS = "any tokens"


@dataclass(frozen=True)
class SearchStep:
    """Result of one step of the search, on the prompts of the search.

    Args:
        added (`ForcedHead`, *optional*): The forced head that this step adds, `None` for the unchanged model.
        accuracy, candidate_accuracy (`float`): Accuracy with all forced heads so far, in the full vocabulary and among the
            candidates.
        fixed, new_mistakes (`int`): Number of prompts that are wrong without forced heads and right with them, and the
            reverse, by the objective of the search.
        score (`float`): Accuracy by the objective minus the penalty for new mistakes.
    """

    added: ForcedHead | None
    accuracy: float
    candidate_accuracy: float
    fixed: int
    new_mistakes: int
    score: float


@dataclass(frozen=True)
class FoundRepair:
    """Forced heads that repair a task, found by a beam search.

    Args:
        tokens (`str`): Name of the set of tokens that the heads attend to, or `"any tokens"`.
        heads (`list[ForcedHead]`): The forced heads in the order in which they were found, empty if none helps.
        steps (`list[SearchStep]`): The unchanged model, and then each step.
    """

    tokens: str
    heads: list[ForcedHead]
    steps: list[SearchStep]


@dataclass(frozen=True)
class RepairSearch:
    """Results of a search for repairs, on the prompts of the search.

    Args:
        repairs (`list[FoundRepair]`): The repair with each set of tokens, and with several sets the one in which each head may
            attend to any of them. The highest scores come first.
        sets (`dict[str, tuple[str, ...]]`): Name of each set of tokens -> names of its positions.
        alone (`dict[str, torch.Tensor]`): Name -> accuracy with each head forced alone, `(sets, layers, heads)`, NaN in layers
            that were not searched: `accuracy`, `candidate_accuracy`, and `score` of the search.
        runs (`int`): Number of edits that were tried.
    """

    repairs: list[FoundRepair]
    sets: dict[str, tuple[str, ...]]
    alone: dict[str, torch.Tensor]
    runs: int


@measures_model
def search_repair(
    model: PreTrainedModel,
    task: Task,
    *,
    query: str = "END",
    tokens: Mapping[str, Sequence[str]] | None = None,
    layers: Iterable[int] | None = None,
    objective: Literal["accuracy", "candidate_accuracy"] = "accuracy",
    penalty: float = 1.0,
    max_heads: int = 4,
    shortlist: int = 32,
    beam: int = 3,
    batch_size: int | None = None,
    progress: bool = False,
) -> RepairSearch:
    """Search for heads whose attention, forced onto other tokens, makes a model do a task.

    Every head of the searched layers is forced to attend, from the query token, only to each set of tokens. For each set,
    the best few heads are kept, then the best few combinations of one of them with another head, and so on, as long as the
    score rises: two heads that differ by one prompt can lead to different repairs. After the first step, only the heads
    with the highest scores alone are added. All edits run as rows of one forward pass from their layer on;
    tokens before the query token are not run again.

    Some sets give the answer away: a head that copies needs only to be forced onto the right word. Compare the sets.

    The heads found are the best of many on these prompts: judge them on other prompts ([`find_repair`]).

    Args:
        model ([`~transformers.PreTrainedModel`]):
            A causal language model, which runs in evaluation mode.
        task ([`Task`]):
            The prompts. Corrupted prompts are not needed.
        query (`str`, *optional*, defaults to `"END"`):
            Name of the position from which attention is forced.
        tokens (`Mapping[str, Sequence[str]]`, *optional*):
            Name of each set of tokens -> names of its positions, or `"first token"`. By default those of [`token_sets`].
        layers (`Iterable[int]`, *optional*):
            The layers to search. By default those from a quarter of the depth up.
        objective (`"accuracy"` or `"candidate_accuracy"`, *optional*, defaults to `"accuracy"`):
            The accuracy to raise: in the full vocabulary, or among the candidates.
        penalty (`float`, *optional*, defaults to 1.0):
            Amount by which a prompt that is right without the edit and wrong with it lowers the score, in prompts, besides
            its share of the accuracy.
        max_heads (`int`, *optional*, defaults to 4):
            Largest number of heads in the repair.
        shortlist (`int`, *optional*, defaults to 32):
            Number of forced heads of each set that are tried after the first step.
        beam (`int`, *optional*, defaults to 3):
            Number of combinations that are kept in each step; 1 is a greedy search.
        batch_size (`int`, *optional*):
            Number of edits times prompts in one forward pass. By default it follows from the memory.
        progress (`bool`, *optional*, defaults to `False`):
            Whether to show progress bars.

    Returns:
        [`RepairSearch`]

    Raises:
        [`TranscoderError`]: a layer, position or objective does not exist, a number is out of range, or the model's
            attention cannot be edited.
    """
    if objective not in OBJECTIVES:
        raise TranscoderError(f"There is no objective '{objective}': choose from {', '.join(OBJECTIVES)}.")
    if not 0 <= penalty < float("inf"):
        raise TranscoderError(f"penalty is {penalty}, but must be 0 or a positive number.")
    if min(max_heads, shortlist, beam) < 1:
        raise TranscoderError(
            f"max_heads is {max_heads}, shortlist is {shortlist} and beam is {beam}, but each must be at least 1."
        )
    depth, heads = num_layers(model), num_heads(model)[0]
    layers = sorted(set(range(depth // 4, depth) if layers is None else layers))
    if not layers:
        raise TranscoderError("There are no layers to search: give at least one.")
    check_heads([(layer, 0) for layer in layers], depth, heads)
    sets = {name: tuple(each) for name, each in (token_sets(task, query) if tokens is None else tokens).items()}
    if not sets:
        raise TranscoderError("There are no tokens to force attention onto: give at least one set.")
    attention = ForcedAttention(task, sets, query)
    # No ablation writes anything here, and this one needs no runs of other prompts.
    engine = PatchEngine(
        model, task, ablation="zero", metric=RightAnswers(model, task), batch_size=batch_size, progress=progress
    )

    edits = [ForcedHead((layer, head), name) for name in sets for layer in layers for head in range(heads)]
    measured = _measure(engine, attention, [[edit] for edit in edits])
    shares = {name: measured[name][1:].double().mean(1) for name in OBJECTIVES}
    shares["score"] = _scores(measured, objective, penalty)[1:]
    alone = {}
    for name, values in shares.items():
        alone[name] = torch.full((len(sets), depth, heads), torch.nan, dtype=torch.float64)
        alone[name][:, layers] = values.view(len(sets), len(layers), heads)

    repairs, runs = [], len(edits)
    for name in (*sets, *([ANY_TOKENS] if len(sets) > 1 else [])):
        chosen = [index for index, edit in enumerate(edits) if name in (edit.tokens, ANY_TOKENS)]
        first = {key: values[[0, *(1 + index for index in chosen)]] for key, values in measured.items()}
        found, steps, tried = _grow(
            engine,
            attention,
            [edits[index] for index in chosen],
            first,
            objective,
            penalty,
            max_heads,
            shortlist,
            beam,
        )
        repairs.append(FoundRepair(name, found, steps))
        runs += tried
    repairs.sort(key=lambda repair: -repair.steps[-1].score)
    return RepairSearch(repairs, sets, alone, runs)


def _grow(engine, attention, edits, measured, objective, penalty, max_heads, shortlist, beam):
    """Add forced heads to the best few combinations until none helps, given the effect of each edit alone.

    Returns:
        `tuple`: the forced heads and the steps of the combination with the highest score, and the number of runs.
    """
    scores = _scores(measured, objective, penalty)
    nothing = [], [_step(None, measured, scores, 0, objective)]
    order = scores[1:].argsort(descending=True, stable=True)[:shortlist].tolist()
    listed = [edits[index] for index in order]
    combinations, parents = [[edit] for edit in edits], [nothing] * len(edits)
    best, tried = nothing, 0
    while True:
        grown = []
        for row in _ranked(measured, scores, objective):
            heads, steps = parents[row - 1]
            # Scores are multiples of the share of one prompt, up to rounding.
            if len(grown) < beam and scores[row] > steps[-1].score + 1e-9:
                new = combinations[row - 1]
                grown.append((new, [*steps, _step(new[-1], measured, scores, row, objective)]))
        if grown and grown[0][1][-1].score > best[1][-1].score + 1e-9:
            best = grown[0]
        # Nothing is left to gain with all prompts right and no new mistakes.
        if best[1][-1].score == 1:
            break
        extended = {}
        for path in grown:
            if len(path[0]) < max_heads:
                taken = {each.head for each in path[0]}
                for edit in listed:
                    if edit.head not in taken:
                        # The order in which heads were added makes no difference.
                        extended.setdefault(frozenset([*path[0], edit]), ([*path[0], edit], path))
        if not extended:
            break
        combinations, parents = map(list, zip(*extended.values(), strict=True))
        measured = _measure(engine, attention, combinations)
        scores = _scores(measured, objective, penalty)
        tried += len(combinations)
    return *best, tried


def _measure(engine, attention, rows):
    """Whether answers are right, `(1 + rows, prompts)` for each objective, first of the unchanged model."""
    patched = engine.run(attention.plan(rows))
    values = torch.cat([patched.base[None], patched.values])
    return dict(zip(OBJECTIVES, split_right(values), strict=True))


def _scores(measured, objective, penalty):
    """Score of each row, as a share of prompts."""
    right = measured[objective]
    return right.double().mean(1) - penalty * (right[:1] & ~right).double().mean(1)


def _ranked(measured, scores, objective):
    """Rows by falling score and, among equal ones, by falling other accuracy; without the unchanged model."""
    other = measured[OBJECTIVES[1 - OBJECTIVES.index(objective)]].double().mean(1).tolist()
    return sorted(range(1, len(scores)), key=lambda row: (-round(scores[row].item(), 9), -other[row]))


def _step(added, measured, scores, row, objective):
    right = measured[objective]
    return SearchStep(
        added,
        measured["accuracy"][row].double().mean().item(),
        measured["candidate_accuracy"][row].double().mean().item(),
        int((right[row] & ~right[0]).sum()),
        int((~right[row] & right[0]).sum()),
        scores[row].item(),
    )
