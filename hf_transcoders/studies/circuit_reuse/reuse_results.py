"""The results of a study of circuit reuse."""

from dataclasses import asdict, dataclass, field

from ...circuits.patching.faithfulness import Faithfulness
from ...circuits.patching.results import Head
from ...reports.sections import AttentionView
from ...tasks.answer_metrics import Estimate
from .found_repair import RepairStudy
from .movers import MoverChange
from .overlap import Overlap
from .published_heads import Published
from .repair import Outcome
from .reuse_tables import reuse_text
from .roles import Roles
from .stages import Stage


@dataclass(frozen=True)
class Repair:
    """The repair with one selection of heads.

    Args:
        selection (`str`): Criterion of the selection: `"role tests"`, `"path patching"` or `"published"`.
        inhibition, negative (`list[Head]`): The selected inhibition heads and negative movers.
        outcomes (`list[Outcome]`): Outcomes under each edit, empty if no head is selected.
        movers ([`MoverChange`], *optional*): Effects of the whole edit on the movers after the edited heads.
    """

    selection: str
    inhibition: list[Head]
    negative: list[Head]
    outcomes: list[Outcome] = field(default_factory=list)
    movers: MoverChange | None = None


@dataclass(frozen=True)
class CircuitReuse:
    """Results of the study.

    Args:
        accuracy (`dict[str, dict[str, Estimate]]`): Metrics of the clean prompts of each task.
        stages (`dict[str, list[Stage]]`): Traced stages of each task.
        overlaps (`list[Overlap]`): Overlap of the two tasks at each threshold.
        roles ([`Roles`]): Heads by role.
        faithfulness (`dict[str, list[Faithfulness]]`): Faithfulness of the circuits of both tasks, and of random ones, on each
            task.
        repairs (`list[Repair]`): The repair with each selection of heads.
        published ([`Published`], *optional*): Published results on this model.
        search ([`RepairStudy`], *optional*): Heads for the repair that were found by search, not through IOI.
        protocol (`dict`): Settings of the study.
        attention (`list[AttentionView]`): Attention of the strongest heads in the first prompt of each task.
        warnings (`list[str]`): A warning for each task that the model does not do.
    """

    accuracy: dict[str, dict[str, Estimate]]
    stages: dict[str, list[Stage]]
    overlaps: list[Overlap]
    roles: Roles
    faithfulness: dict[str, list[Faithfulness]]
    repairs: list[Repair]
    published: Published | None
    search: RepairStudy | None
    protocol: dict
    attention: list[AttentionView] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def to_dict(self) -> dict:
        """All numbers as JSON, except those of each prompt in path patching."""
        return {
            "protocol": self.protocol,
            "warnings": self.warnings,
            "accuracy": {task: _dicts(metrics) for task, metrics in self.accuracy.items()},
            "stages": {task: [stage_to_dict(stage) for stage in stages] for task, stages in self.stages.items()},
            "overlaps": _dicts(self.overlaps),
            "roles": self.roles.to_dict(),
            "faithfulness": {task: _dicts(found) for task, found in self.faithfulness.items()},
            "repairs": _dicts(self.repairs),
            "search": None if self.search is None else self.search.to_dict(),
            "published": None if self.published is None else asdict(self.published),
        }

    def to_text(self) -> str:
        """The main numbers as text for a terminal."""
        return reuse_text(self)

    __str__ = to_text


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


def _dicts(records):
    if isinstance(records, dict):
        return {name: asdict(record) for name, record in records.items()}
    return [asdict(record) for record in records]
