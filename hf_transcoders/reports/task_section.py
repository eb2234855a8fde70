"""The section of a results page on the performance of the model on the task."""

from ..tasks.performance import TaskPerformance
from .sections import Section, Table


def task_section(performance: TaskPerformance) -> Section:
    """Make the section with the performance of the model, which stands before all findings.

    Args:
        performance ([`~hf_transcoders.tasks.TaskPerformance`]): Measured performance.

    Returns:
        [`Section`]
    """
    guess = "" if performance.chance is None else f"Accuracy among candidates by guessing: {performance.chance:.3f}. "
    table = Table(
        "Scores of the unpatched model", performance.headings(), performance.rows(),
        f"{guess}In brackets, 95% intervals over prompts. Answers are those of the clean prompts.",
    )  # fmt: skip
    return Section("Task performance of the model", tables=[table], warning=performance.warning or "")
