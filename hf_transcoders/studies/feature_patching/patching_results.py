"""Results of feature patching and their tables."""

import statistics
from dataclasses import asdict, dataclass
from typing import Any

from ...reports.lines import LineChart
from ...reports.sections import Table, tables_text
from ...text.columns import paired


# Numbers of patched features in the table.
SHOWN_COUNTS = (8, 32, 128)


@dataclass
class PatchingPoint:
    """
    One set of patched features.

    Args:
        patched (`int`): Number of patched features.
        kl (`float`): Mean over prompts of KL(patched || counterfactual), in nats.
        edit_size (`float`): Mean over tokens of the Euclidean norm of the edit, measured for this very set.
        threshold (`float`, *optional*): Threshold at which the set was reached; `None` for the sets of all and of none.
    """

    patched: int
    kl: float
    edit_size: float
    threshold: float | None = None


@dataclass
class PatchingCurve:
    """
    Sets of patched features from all to none, for one order of visits.

    Args:
        order (`str`): Order in which features are visited: `"attribution"` or `"random, seed 0"`.
        points (`list[PatchingPoint]`): Sets, the largest first, ending in the empty one.
        area (`float`): Mean KL over all numbers of patched features from 0 to the limit of the study.
        sets_measured (`int`): Number of sets that were run to find them.
    """

    order: str
    points: list[PatchingPoint]
    area: float
    sets_measured: int

    def kl_at(self, count: int) -> float:
        """KL of the largest set of at most `count` features."""
        return next(point.kl for point in self.points if point.patched <= count)


@dataclass
class PatchedDictionary:
    """
    Feature patching with one dictionary.

    Args:
        name (`str`): Name of the dictionary; `±` before it where the two signs of a direction are patched one by one.
        site (`str`): Output site.
        num_units (`int`): Number of features, or of directions where their signs are patched together.
        num_changing (`int`): Number of them that have another activation in a counterfactual prompt.
        kl_none, kl_all (`float`): KL without patches, and with all features patched.
        curves (`list[PatchingCurve]`): One for each order of visits.
    """

    name: str
    site: str
    num_units: int
    num_changing: int
    kl_none: float
    kl_all: float
    curves: list[PatchingCurve]

    @property
    def area(self) -> float:
        """Mean area over orders of visits."""
        return statistics.fmean(curve.area for curve in self.curves)


@dataclass
class FeaturePatchingStudy:
    """
    Results of feature patching.

    Args:
        dictionaries (`list[PatchedDictionary]`): Results by dictionary.
        max_patched (`int`): Limit of the areas.
        protocol (`dict`): Model, prompts and settings.
        warning (`str`, *optional*): Why the results mean nothing, if the model does not do the task.
    """

    dictionaries: list[PatchedDictionary]
    max_patched: int
    protocol: dict[str, Any]
    warning: str | None = None

    def to_text(self) -> str:
        """Format the table and the protocol as text for a terminal."""
        lines = [tables_text([patching_table(self)]), "", paired(self.protocol)]
        return "\n".join([*([self.warning, ""] if self.warning else []), *lines])

    __str__ = to_text

    def to_dict(self) -> dict[str, Any]:
        """Return all results as JSON values."""
        return asdict(self)


def patching_area(points: list[PatchingPoint], max_patched: int) -> float:
    """Mean KL over 0 to `max_patched` patched features, with at each number the largest set that is not larger."""
    total, above = 0.0, max_patched + 1
    for point in points:
        if point.patched < above:
            total += point.kl * (above - point.patched)
            above = point.patched
    return total / (max_patched + 1)


def patching_table(study: FeaturePatchingStudy) -> Table:
    headers = ["dictionary", "site", "features", "changing", "none", *map(str, SHOWN_COUNTS), "all"]
    headers += [f"area to {study.max_patched}", "other orders"]
    rows = []
    for each in study.dictionaries:
        first, *others = each.curves
        spread = ", ".join(f"{curve.area:.3f}" for curve in others) or "–"
        rows.append(
            [each.name, each.site, each.num_units, each.num_changing, f"{each.kl_none:.3f}"]
            + [f"{first.kl_at(count):.3f}" for count in SHOWN_COUNTS]
            + [f"{each.kl_all:.3f}", f"{first.area:.3f}", spread]
        )
    note = (
        "KL(patched || counterfactual) at the last token, in nats, with as many features patched as the column says, at most; "
        f"features are chosen by thresholds and visited by {study.dictionaries[0].curves[0].order if study.dictionaries else ''}. "
        "Lower is better. Cunningham et al. (2023), Fig. 3, print curves without numbers, of Pythia-410M, layer 11."
    )
    return Table("Feature patching", headers, rows, note)


def patching_charts(study: FeaturePatchingStudy) -> dict[str, LineChart]:
    """KL over the number of patched features, and over the size of the edit, for the first order of visits."""
    by_count, by_size = {}, {}
    for each in study.dictionaries:
        points = each.curves[0].points[::-1]
        few = [point for point in points if point.patched <= study.max_patched]
        by_count[each.name] = [(point.patched, point.kl) for point in few]
        by_size[each.name] = sorted((point.edit_size, point.kl) for point in points)
    label = "KL to the counterfactual, nats"
    charts = {}
    for key, title, axis, lines in (
        ("features", "By number of patched features", "features patched", by_count),
        ("edit_size", "By size of the edit", "mean norm of the edit", by_size),
    ):
        if len({x for line in lines.values() for x, _ in line}) > 1:
            charts[key] = LineChart(title, axis, label, lines)
    return charts
