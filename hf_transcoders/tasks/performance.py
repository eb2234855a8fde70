"""Check whether a language model can do a task, before its circuits are studied."""

from dataclasses import dataclass

from .answer_metrics import Estimate
from .measuring import measure
from .task import Task


# Metrics in the order in which they are shown.
_SHOWN = ("logit_difference", "accuracy", "candidate_accuracy")
_NAMES = {
    "logit_difference": "logit difference",
    "accuracy": "accuracy, full vocabulary",
    "candidate_accuracy": "accuracy among candidates",
}


@dataclass(frozen=True)
class TaskPerformance:
    """The performance of a model on a task.

    Args:
        task (`str`): Name of the task.
        measured (`dict[str, dict[str, Estimate]]`): For `"clean"` and `"corrupted"` prompts, the metrics of [`measure`].
        chance (`float`, *optional*): Accuracy among candidates by guessing; `None` without wrong answers.
    """

    task: str
    measured: dict[str, dict[str, Estimate]]
    chance: float | None

    @property
    def warning(self) -> str | None:
        """A warning if the model does not do the task; otherwise `None`."""
        clean = self.measured["clean"]
        return ability_warning(
            self.task,
            ("logit difference", clean["logit_difference"]) if "logit_difference" in clean else None,
            ("accuracy", clean["accuracy"])
            if self.chance is None
            else ("accuracy among candidates", clean["candidate_accuracy"]),
            self.chance or 0.0,
        )

    def rows(self) -> list[list[str]]:
        """A row for clean and for corrupted prompts: its name and metrics, under the headings of [`headings`]."""
        return [[which, *(str(found[name]) for name in self._names())] for which, found in self.measured.items()]

    def headings(self) -> list[str]:
        """Headings of the columns of [`rows`]."""
        return ["prompts", *(_NAMES[name] for name in self._names())]

    def _names(self):
        return [name for name in _SHOWN if name in self.measured["clean"]]

    def to_dict(self) -> dict:
        """All numbers as JSON, and the warning."""
        return {
            "task": self.task,
            "measured": {
                which: {name: estimate.to_dict() for name, estimate in found.items()}
                for which, found in self.measured.items()
            },
            "chance": self.chance,
            "warning": self.warning,
        }


def task_performance(
    model, task: Task, batch_size: int = 32, confidence: float = 0.95, seed: int = 0, progress: bool = False
) -> TaskPerformance:
    """Measure how well a model does a task.

    Args:
        model ([`~transformers.PreTrainedModel`]): A causal language model, which runs in evaluation mode.
        task ([`Task`]): Prompts and answers.
        batch_size, confidence, seed, progress: As for [`measure`].

    Returns:
        [`TaskPerformance`]
    """
    return TaskPerformance(task.name, measure(model, task, batch_size, confidence, seed, progress), chance(task))


def chance(task: Task) -> float | None:
    """Accuracy among the candidates of a task by guessing; `None` if it has no wrong answers."""
    answers = task.answers()
    if not answers.wrong.shape[1]:
        return None
    real = answers.candidates >= 0
    right = (answers.candidates[:, :, None] == answers.right[:, None]).any(-1) & real
    return (right.sum(1) / real.sum(1)).mean().item()


def ability_warning(
    task: str,
    score: tuple[str, Estimate] | None,
    accuracy: tuple[str, Estimate] | None,
    chance: float | None = None,
) -> str | None:
    """A warning if a model does not do a task: a score whose interval includes 0, or an accuracy at chance.

    Args:
        task (`str`): Name of the task.
        score (`tuple[str, Estimate]`, *optional*): Name and value of a score that is positive where the task is done.
        accuracy (`tuple[str, Estimate]`, *optional*): Name and value of an accuracy.
        chance (`float`, *optional*): The accuracy by guessing; without it, the accuracy is not judged.

    Returns:
        `str` or `None`: one sentence.
    """
    found = []
    if score is not None and score[1].low <= 0:
        what = "is negative" if score[1].high < 0 else "includes 0"
        found.append(f"the {score[1].confidence:.0%} interval of its {score[0]}, {score[1]}, {what}")
    if accuracy is not None and chance is not None and accuracy[1].low <= chance:
        found.append(f"its {accuracy[0]}, {accuracy[1]}, is not above chance ({chance:.3f})")
    if not found:
        return None
    return (
        f"The model does not do the task '{task}': {', and '.join(found)}. Findings about how it does the task are then "
        "meaningless: choose another model or task."
    )
