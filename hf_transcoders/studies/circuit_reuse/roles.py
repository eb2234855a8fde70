"""Roles of heads in a circuit, by tests with stated thresholds."""

from dataclasses import asdict, dataclass

import torch
from transformers import PreTrainedModel

from ...circuits.patching.head_scores import attention_between, pattern_scores
from ...circuits.patching.results import Head
from ...circuits.patching.weight_scores import (
    composition_scores,
    copying_scores,
    duplicate_token_scores,
    previous_token_scores,
)
from ...lm.wrappers import measures_model
from ...tasks.task import Task
from .stages import Stage, head_count, top_mask


@dataclass(frozen=True)
class RoleTests:
    """Thresholds of the role tests.

    Args:
        share (`float`, *optional*, defaults to 0.05):
            Share of heads, ranked by magnitude, that can act in a stage. The interval of an acting head also excludes 0.
        attention (`float`, *optional*, defaults to 0.1):
            Smallest mean attention from `END` to the words of a role.
        copying (`float`, *optional*, defaults to 0.5):
            Smallest share of answers that a mover raises to the five highest logits (a negative mover: lowers to the five
            lowest) when it attends to them.
        pattern (`float`, *optional*, defaults to 0.3):
            Smallest mean attention of previous-token, duplicate-token and induction heads on repeated random tokens.
    """

    share: float = 0.05
    attention: float = 0.1
    copying: float = 0.5
    pattern: float = 0.3


#: Role -> the test that a head must pass.
ROLES = {
    "mover": "acts on the logits of IOI, positive; attends from END to IO, more than to both S; copies names",
    "negative mover": "acts on the logits of IOI, negative; attends from END to the names; lowers the attended name",
    "inhibition": "acts on the movers' queries of IOI, positive; attends from END to S2, more than to IO",
    "content gatherer": "acts on the movers' queries of Colored Objects, positive; attends from END to the object in question",
    "induction": "on repeated random tokens, attends to the token after the earlier occurrence",
    "duplicate token": "on repeated random tokens, attends to the earlier occurrence",
    "previous token": "on repeated random tokens, attends to the previous token",
}


@dataclass(frozen=True)
class Roles:
    """Heads of each role, and the scores of all heads.

    Args:
        heads (`dict[str, list[Head]]`): Role -> heads that pass its test, the strongest first.
        evidence (`dict[str, torch.Tensor]`):
            Name -> a score of each head, `(layers, heads)`. Scores that begin with `weights:` are from the weights alone,
            and are not used in the tests.
        previous (`list[Head]`): The previous-token heads whose composition with the keys of all heads is in `evidence`.
        tests ([`RoleTests`]): The thresholds.
    """

    heads: dict[str, list[Head]]
    evidence: dict[str, torch.Tensor]
    previous: list[Head]
    tests: RoleTests

    def to_dict(self) -> dict:
        """All fields as JSON."""
        return {
            "tests": asdict(self.tests),
            "meaning": ROLES,
            "heads": {role: [list(head) for head in heads] for role, heads in self.heads.items()},
            "evidence": {name: table.tolist() for name, table in self.evidence.items()},
            "previous_token_heads_for_composition": [list(head) for head in self.previous],
        }


@measures_model
def find_roles(
    model: PreTrainedModel,
    ioi: Task,
    ioi_stages: list[Stage],
    colors: Task,
    colors_stages: list[Stage],
    tests: RoleTests | None = None,
    bos_token_id: int | None = None,
    seed: int = 0,
) -> Roles:
    """Test every head for every role.

    Args:
        model ([`~transformers.PreTrainedModel`]): A causal language model, which runs in evaluation mode.
        ioi, colors ([`Task`]): The tasks IOI and Colored Objects.
        ioi_stages, colors_stages (`list[Stage]`): The stages of both tasks, from [`trace_stages`].
        tests ([`RoleTests`], *optional*): Thresholds of the tests.
        bos_token_id (`int`, *optional*): Token to put before the random tokens.
        seed (`int`, *optional*, defaults to 0): Seed for the random tokens and the bootstrap resamples.

    Returns:
        [`Roles`]
    """
    tests = tests or RoleTests()
    names = sorted({token for row in ioi.dataset["candidate_ids"] for token in row})
    evidence = {}
    attention = attention_between(model, ioi, "END", ["IO", "S1", "S2"]).mean(-1)
    for key, table in zip(("IO", "S1", "S2"), attention.unbind(-1), strict=True):
        evidence[f"attention END to {key}"] = table
    evidence["attention END to thing"] = attention_between(model, colors, "END", ["question_object"]).mean(-1)[..., 0]
    evidence |= {name.replace("_", " "): table for name, table in copying_scores(model, names).items()}
    evidence |= {
        name.replace("_", " "): table
        for name, table in pattern_scores(model, seed=seed, bos_token_id=bos_token_id).items()
    }
    acting = {}
    for task, stages in (("IOI", ioi_stages), ("Colored Objects", colors_stages)):
        for stage in stages[:2]:
            name = f"{task}, {stage.name}"
            evidence[name] = stage.result.effects
            acting[name] = acts(stage, tests.share, seed)
    heads = assign_roles(evidence, acting, tests)
    previous_scores = evidence["previous token"]
    previous = heads["previous token"] or [divmod(int(previous_scores.argmax()), previous_scores.shape[1])]
    evidence["weights: same token"] = duplicate_token_scores(model, names)
    evidence["weights: previous position"] = previous_token_scores(model)
    evidence["weights: keys from previous-token heads"] = composition_scores(model, previous).amax(0)
    return Roles(heads, evidence, previous, tests)


def acts(stage: Stage, share: float, seed: int = 0) -> torch.Tensor:
    """Find the heads that act in a stage: 1 helps the task, -1 works against it, 0 neither, `(layers, heads)`."""
    effects = stage.result.effects
    low, high = stage.result.intervals(seed=seed)
    strong = top_mask(effects.flatten()[:, None], head_count(share, effects.numel()))[:, 0].view(effects.shape)
    return torch.where(strong & (low > 0), 1, torch.where(strong & (high < 0), -1, 0))


def assign_roles(
    evidence: dict[str, torch.Tensor], acting: dict[str, torch.Tensor], tests: RoleTests
) -> dict[str, list[Head]]:
    """Find the heads that pass the test of each role, from scores as in [`Roles`]."""
    io, s1, s2 = (evidence[f"attention END to {name}"] for name in ("IO", "S1", "S2"))
    nothing = torch.zeros_like(io)
    logits = acting.get("IOI, logits", nothing)
    queries = acting.get("IOI, mover queries", nothing)
    gathers = acting.get("Colored Objects, mover queries", nothing)
    passed = {
        "mover": (logits > 0) & (io >= tests.attention) & (io > s1 + s2) & (evidence["copying"] >= tests.copying),
        "negative mover": (logits < 0)
        & (io + s1 + s2 >= tests.attention)
        & (evidence["negative copying"] >= tests.copying),
        "inhibition": (queries > 0) & (s2 >= tests.attention) & (s2 > io),
        "content gatherer": (gathers > 0) & (evidence["attention END to thing"] >= tests.attention),
        "induction": evidence["induction"] >= tests.pattern,
        "duplicate token": evidence["duplicate token"] >= tests.pattern,
        "previous token": evidence["previous token"] >= tests.pattern,
    }
    strength = {
        "mover": evidence.get("IOI, logits", nothing),
        "negative mover": -evidence.get("IOI, logits", nothing),
        "inhibition": evidence.get("IOI, mover queries", nothing),
        "content gatherer": evidence.get("Colored Objects, mover queries", nothing),
    }
    found = {}
    for role, mask in passed.items():
        score = strength.get(role, evidence.get(role, nothing))
        found[role] = sorted((tuple(head) for head in mask.nonzero().tolist()), key=lambda at: -score[at].item())
    return found
