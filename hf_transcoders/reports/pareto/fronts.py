"""Pareto fronts of sparsity and fidelity over dictionaries."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ...evaluation.evaluation_report import METRICS, EvaluationReport
from ..plots import is_finite


#: Fidelity metric -> whether higher is better.
HIGHER_IS_BETTER = {"fvu": False, "ce_recovered_zero": True, "ce_recovered_mean": True}

#: Protocol entry that comparable measurements share -> its name for readers.
PROTOCOL_FACTS = {
    "base_model": "base model",
    "base_model_revision": "revision",
    "dataset": "data",
    "dataset_split": "split",
    "fidelity_tokens": "tokens for fidelity",
    "loss_tokens": "tokens for losses",
    "sequence_length": "tokens of a block",
    "begins_with_bos": "blocks begin with BOS",
    "skip_first": "positions left out at the start",
    "special_token_ids": "token ids left out",
    "ablation": "ablations",
    "dtype": "precision",
}


@dataclass
class MeasuredDictionary:
    """
    A dictionary with its metrics.

    Args:
        run (`str`): Run that trained the dictionary.
        name (`str`): Name of the dictionary in that run.
        metrics (`dict[str, float]`): Metrics by their names in [`EvaluationReport`].
        source (`str`): Source of the metrics, for readers, such as `"evaluation"` or `"training batches"`.
        step (`int`, *optional*): Optimizer step of the measurement.
        protocol (`dict[str, Any]`, *optional*): Measurement protocol, if it is known.
        config (`dict[str, Any]`): Known configuration, such as `input_site`, `output_site` and `num_features`.
    """

    run: str
    name: str
    metrics: dict[str, float]
    source: str
    step: int | None = None
    protocol: dict[str, Any] | None = None
    config: dict[str, Any] = field(default_factory=dict)

    @property
    def reads(self) -> str | None:
        return self.config.get("input_site")

    @property
    def writes(self) -> str | None:
        return self.config.get("output_site")

    @property
    def task(self) -> str:
        """Kind of the dictionary and the site that it reads, in words."""
        if self.writes is None:
            return "sites not recorded"
        return f"SAE ({self.reads})" if self.reads == self.writes else f"transcoder (from {self.reads})"

    def has(self, metric: str) -> bool:
        """Whether both L0 and `metric` are finite numbers."""
        return all(is_finite(self.metrics.get(name)) for name in ("l0", metric))


def measured_in(report: EvaluationReport, run: str) -> list[MeasuredDictionary]:
    """Return the dictionaries of an evaluation with their metrics."""
    return [
        MeasuredDictionary(run, name, entry["metrics"], "evaluation", None, report.protocol, entry["config"])
        for name, entry in report.dictionaries.items()
    ]


def pareto_front(points: Sequence[tuple[float, float]], higher_is_better: bool = False) -> list[bool]:
    """
    Find the points that no other point dominates. A point dominates another if it is at least as good in both coordinates
    and better in one; equal points do not dominate each other.

    Args:
        points (`Sequence[tuple[float, float]]`): Pairs `(L0, fidelity)`; a lower L0 is better.
        higher_is_better (`bool`, *optional*, defaults to `False`): Whether a higher fidelity is better.

    Returns:
        `list[bool]`: Whether each point is on the front.
    """
    sign = -1.0 if higher_is_better else 1.0
    on_front = [False] * len(points)
    best_x, best_y = math.inf, math.inf
    for index in sorted(range(len(points)), key=lambda i: (points[i][0], sign * points[i][1])):
        x, y = points[index][0], sign * points[index][1]
        # The first of each x is the best; points equal to it are on the front as well.
        if y < best_y or (x, y) == (best_x, best_y):
            on_front[index] = True
            best_x, best_y = x, y
    return on_front


@dataclass
class ParetoFronts:
    """
    Dictionaries measured by one protocol, and the ones among them on a front. Each front compares dictionaries that read the
    same site and write the same site.

    Args:
        dictionaries (`list[MeasuredDictionary]`): Dictionaries, sorted by the sites that they write and read, then by L0.
        on_front (`dict[str, list[bool | None]]`):
            For each metric, whether each dictionary is on the front; `None` if it was not measured.
        protocol (`dict[str, Any]`, *optional*): Protocol of all measurements, if it is known and the same.
        differences (`dict[str, list]`): Protocol entries that differ -> their values, with mixed protocols.
    """

    dictionaries: list[MeasuredDictionary]
    on_front: dict[str, list[bool | None]]
    protocol: dict[str, Any] | None
    differences: dict[str, list[Any]] = field(default_factory=dict)

    def targets(self) -> dict[str | None, list[int]]:
        """Indices of the dictionaries by the site that they write."""
        targets: dict[str | None, list[int]] = {}
        for index, dictionary in enumerate(self.dictionaries):
            targets.setdefault(dictionary.writes, []).append(index)
        return targets

    def is_dominated(self, index: int) -> bool:
        """Whether a dictionary was measured and is on none of the fronts."""
        places = [front[index] for front in self.on_front.values()]
        return False in places and True not in places

    def standing(self, index: int) -> str:
        """Describe whether a dictionary is on a front."""
        places = {METRICS[metric]: front[index] for metric, front in self.on_front.items() if front[index] is not None}
        on = [name for name, place in places.items() if place]
        if not places:
            return "not measured"
        if not on:
            return "dominated"
        return "front" if len(on) == len(places) else f"front: {', '.join(on)}"


def pareto_fronts(
    dictionaries: Sequence[MeasuredDictionary], *, ablation: str = "zero", allow_mixed: bool = False
) -> list[ParetoFronts]:
    """
    Compute the Pareto fronts of L0 and FVU and of L0 and CE recovered.

    Metrics measured in different ways (on other data, tokens or positions, or with other ablations) are not comparable, so
    each protocol has separate fronts.

    Args:
        dictionaries (`Sequence[MeasuredDictionary]`):
            Dictionaries of any number of runs.
        ablation (`"zero"` or `"mean"`, *optional*, defaults to `"zero"`):
            Ablation that the CE recovered is measured against.
        allow_mixed (`bool`, *optional*, defaults to `False`):
            Whether to put all dictionaries on one front; `differences` then holds the differences of the protocols.

    Returns:
        `list[ParetoFronts]`: Fronts of each protocol.
    """
    groups: dict[str, list[MeasuredDictionary]] = {}
    for dictionary in dictionaries:
        groups.setdefault("" if allow_mixed else _protocol_key(dictionary), []).append(dictionary)
    return [_fronts_of(group, ("fvu", f"ce_recovered_{ablation}")) for group in groups.values()]


def protocol_differences(protocols: Sequence[Mapping[str, Any] | None]) -> dict[str, list[Any]]:
    """Return the entries in which protocols differ, with their values; an unknown protocol differs from all others."""
    known = [protocol for protocol in protocols if protocol is not None]
    differences = {}
    for key, fact in PROTOCOL_FACTS.items():
        values = []
        for protocol in known:
            if (value := protocol.get(key)) not in values:
                values.append(value)
        if len(values) > 1:
            differences[fact] = values
    if known and len(known) < len(protocols):
        differences["protocol"] = ["recorded", "not recorded"]
    return differences


def _fronts_of(dictionaries: list[MeasuredDictionary], metrics: Sequence[str]) -> ParetoFronts:
    ordered = sorted(dictionaries, key=_order)
    on_front = {}
    for metric in metrics:
        places: list[bool | None] = [None] * len(ordered)
        jobs: dict[tuple, list[int]] = {}
        for index, dictionary in enumerate(ordered):
            if dictionary.has(metric):
                jobs.setdefault((dictionary.reads, dictionary.writes), []).append(index)
        for members in jobs.values():
            points = [(ordered[i].metrics["l0"], ordered[i].metrics[metric]) for i in members]
            for index, place in zip(members, pareto_front(points, HIGHER_IS_BETTER[metric]), strict=True):
                places[index] = place
        on_front[metric] = places
    differences = protocol_differences([dictionary.protocol for dictionary in ordered])
    return ParetoFronts(ordered, on_front, None if differences else ordered[0].protocol, differences)


def _order(dictionary: MeasuredDictionary):
    l0 = dictionary.metrics.get("l0")
    sites = [_natural(site or "") for site in (dictionary.writes, dictionary.reads)]
    return (*sites, l0 if is_finite(l0) else math.inf, dictionary.run, dictionary.name)


def _natural(text: str) -> list[tuple[int, int, str]]:
    """Sort key by which layer 10 comes after layer 9."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in text.split(".")]


def _protocol_key(dictionary: MeasuredDictionary) -> str:
    if dictionary.protocol is None:
        # Runs without a protocol are not comparable.
        return json.dumps([dictionary.run, dictionary.source])
    return json.dumps({key: dictionary.protocol.get(key) for key in PROTOCOL_FACTS}, sort_keys=True, default=str)
