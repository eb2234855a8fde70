"""Which dictionaries are worth having: Pareto fronts of sparsity against fidelity."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ...evaluation.evaluation_report import METRICS, EvaluationReport
from ..plots import is_finite


#: What L0 is drawn against -> whether more of it is better. CE recovered is that of one ablation.
HIGHER_IS_BETTER = {"fvu": False, "ce_recovered_zero": True, "ce_recovered_mean": True}

#: What two measurements must share to be compared -> what a reader calls it.
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
    A dictionary and the numbers it has.

    Args:
        run (`str`): The run that trained it.
        name (`str`): Its name in that run.
        metrics (`dict[str, float]`): Named as in [`EvaluationReport`].
        source (`str`): Where the numbers come from, for readers: `"evaluation"`, `"training batches"` ...
        step (`int`, *optional*): The optimizer step they belong to.
        protocol (`dict[str, Any]`, *optional*): How they were measured. Without it, nothing is known of that.
        config (`dict[str, Any]`): What is known of the dictionary: `input_site`, `output_site`, `num_features` ...
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
        """What it computes, in words."""
        if self.writes is None:
            return "sites not recorded"
        return f"SAE ({self.reads})" if self.reads == self.writes else f"transcoder (from {self.reads})"

    def has(self, metric: str) -> bool:
        """Whether it can be drawn: both L0 and `metric` are finite numbers."""
        return all(is_finite(self.metrics.get(name)) for name in ("l0", metric))


def measured_in(report: EvaluationReport, run: str) -> list[MeasuredDictionary]:
    """The dictionaries of an evaluation."""
    return [
        MeasuredDictionary(run, name, entry["metrics"], "evaluation", None, report.protocol, entry["config"])
        for name, entry in report.dictionaries.items()
    ]


def pareto_front(points: Sequence[tuple[float, float]], higher_is_better: bool = False) -> list[bool]:
    """
    Which points no other point dominates. A point dominates another when it is no worse in both numbers and better in one;
    of equal points none dominates the other.

    Args:
        points (`Sequence[tuple[float, float]]`): `(L0, fidelity)`; a lower L0 is better.
        higher_is_better (`bool`, *optional*, defaults to `False`): Of the second number.

    Returns:
        `list[bool]`, one for each point.
    """
    sign = -1.0 if higher_is_better else 1.0
    on_front = [False] * len(points)
    best_x, best_y = math.inf, math.inf
    for index in sorted(range(len(points)), key=lambda i: (points[i][0], sign * points[i][1])):
        x, y = points[index][0], sign * points[index][1]
        # Within one x the first is the best; those that equal it stand beside it.
        if y < best_y or (x, y) == (best_x, best_y):
            on_front[index] = True
            best_x, best_y = x, y
    return on_front


@dataclass
class ParetoFronts:
    """
    Dictionaries that were measured in one way, and which of them are on a front. A front is for one job: the dictionaries
    that read the same site and write the same site.

    Args:
        dictionaries (`list[MeasuredDictionary]`): Sorted by what they write and read, then by L0.
        on_front (`dict[str, list[bool | None]]`):
            For each metric and dictionary whether no other dominates it; `None` where it was not measured.
        protocol (`dict[str, Any]`, *optional*): How all of them were measured, where that is known and one.
        differences (`dict[str, list]`): (Only with mixed protocols) Fact -> the values it has.
    """

    dictionaries: list[MeasuredDictionary]
    on_front: dict[str, list[bool | None]]
    protocol: dict[str, Any] | None
    differences: dict[str, list[Any]] = field(default_factory=dict)

    def targets(self) -> dict[str | None, list[int]]:
        """Positions of the dictionaries by what they write."""
        targets: dict[str | None, list[int]] = {}
        for index, dictionary in enumerate(self.dictionaries):
            targets.setdefault(dictionary.writes, []).append(index)
        return targets

    def is_dominated(self, index: int) -> bool:
        """Whether a dictionary was measured and is on no front at all."""
        places = [front[index] for front in self.on_front.values()]
        return False in places and True not in places

    def standing(self, index: int) -> str:
        """Where a dictionary stands, in words."""
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
    The Pareto fronts of L0 against FVU and against CE recovered.

    Numbers measured in different ways (other data, tokens, positions left out, ablations) do not belong on one front:
    each way of measuring has fronts of its own.

    Args:
        dictionaries (`Sequence[MeasuredDictionary]`):
            Of any number of runs.
        ablation (`"zero"` or `"mean"`, *optional*, defaults to `"zero"`):
            Which CE recovered to use.
        allow_mixed (`bool`, *optional*, defaults to `False`):
            Put all on one front all the same; `differences` then says how the protocols differ.

    Returns:
        `list[ParetoFronts]`, one for each way of measuring.
    """
    groups: dict[str, list[MeasuredDictionary]] = {}
    for dictionary in dictionaries:
        groups.setdefault("" if allow_mixed else _protocol_key(dictionary), []).append(dictionary)
    return [_fronts_of(group, ("fvu", f"ce_recovered_{ablation}")) for group in groups.values()]


def protocol_differences(protocols: Sequence[Mapping[str, Any] | None]) -> dict[str, list[Any]]:
    """In which facts protocols differ: fact -> its values. One that is not known differs from all."""
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
    """Layer 10 comes after layer 9."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in text.split(".")]


def _protocol_key(dictionary: MeasuredDictionary) -> str:
    if dictionary.protocol is None:
        # Nothing says that two runs were measured alike.
        return json.dumps([dictionary.run, dictionary.source])
    return json.dumps({key: dictionary.protocol.get(key) for key in PROTOCOL_FACTS}, sort_keys=True, default=str)
