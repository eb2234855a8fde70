"""Outcomes of edits as rows of tables."""

import re
from collections.abc import Sequence

from ...circuits.patching.results import Head
from .repair import Outcome


_CONTROLS = {
    "inhibition alone, random heads": "random heads for inhibition",
    "negative mover alone, random heads": "random heads for negative mover",
}
OUTCOME_HEADERS = ["edit", "accuracy", "among candidates", "right / wrong listed / other", "fixed", "new mistakes"]
OUTCOME_COLUMNS = [
    "edit", "heads", "accuracy", "low", "high", "candidate_accuracy", "candidate_low", "candidate_high",
    "right", "wrong_listed", "other", "fixed", "new_mistakes",
]  # fmt: skip


def outcome_rows(outcomes: Sequence[Outcome]) -> list[list]:
    """Rows of a table with [`OUTCOME_HEADERS`]: each outcome, and then each control as the mean of its draws."""
    rows, draws = [], {}
    for each in outcomes:
        drawn = re.fullmatch(r"(.*random (?:heads|tokens)) \d+", each.condition)
        if drawn:
            draws.setdefault(drawn[1], []).append(each)
            continue
        confusion = "{right} / {wrong_listed} / {other}".format(**each.confusion)
        accuracies = [str(each.accuracy), str(each.candidate_accuracy)]
        rows.append([each.condition, *accuracies, confusion, each.fixed, each.new_mistakes])
    for control, found in draws.items():
        kinds = ("right", "wrong_listed", "other")
        row = [
            f"{_CONTROLS.get(control, control)} ({len(found)} draws)",
            _range([each.accuracy.mean for each in found]),
            _range([each.candidate_accuracy.mean for each in found]),
            " / ".join(f"{sum(each.confusion[kind] for each in found) / len(found):.1f}" for kind in kinds),
            _counts([each.fixed for each in found]),
            _counts([each.new_mistakes for each in found]),
        ]
        rows.append(row)
    return rows


def outcome_values(each: Outcome) -> list:
    """The values of an outcome for a CSV file, in the order of [`OUTCOME_COLUMNS`]."""
    return [
        each.condition,
        " ".join(map(head_name, each.heads)),
        *(each.accuracy.mean, each.accuracy.low, each.accuracy.high),
        *(each.candidate_accuracy.mean, each.candidate_accuracy.low, each.candidate_accuracy.high),
        *each.confusion.values(),
        each.fixed,
        each.new_mistakes,
    ]


def _range(values):
    return f"{sum(values) / len(values):.3f} ({min(values):.3f}–{max(values):.3f})"


def _counts(values):
    return f"{sum(values) / len(values):.1f} ({min(values)}–{max(values)})"


def head_name(head: Head) -> str:
    """A head as layer.head."""
    return f"{head[0]}.{head[1]}"
