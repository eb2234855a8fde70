"""Pareto fronts as a CSV file."""

import os
from collections.abc import Sequence
from pathlib import Path

from ...evaluation.evaluation_report import METRICS
from ...files import write_csv
from .fronts import PROTOCOL_FACTS, ParetoFronts


def save_pareto_csv(path: str | os.PathLike, fronts: Sequence[ParetoFronts]) -> Path:
    """
    Write one row per dictionary, with its configuration, metrics, fronts and protocol.

    Args:
        path (`str` or `os.PathLike`): File to write.
        fronts (`Sequence[ParetoFronts]`): Fronts from [`pareto_fronts`].

    Returns:
        `Path`: Path of the file.
    """
    config = ("input_site", "output_site", "num_features", "activation", "k")
    drawn = list(dict.fromkeys(metric for group in fronts for metric in group.on_front))
    front_columns = [f"on_front_{metric}" for metric in drawn]
    head = ["run", "dictionary", *config, "source", "step", *METRICS, *front_columns, "group", *PROTOCOL_FACTS]
    rows = [
        [
            dictionary.run,
            dictionary.name,
            *(dictionary.config.get(key) for key in config),
            dictionary.source,
            dictionary.step,
            *(dictionary.metrics.get(metric) for metric in METRICS),
            *(group.on_front.get(metric, [None] * (index + 1))[index] for metric in drawn),
            number,
            *((dictionary.protocol or {}).get(key) for key in PROTOCOL_FACTS),
        ]
        for number, group in enumerate(fronts, start=1)
        for index, dictionary in enumerate(group.dictionaries)
    ]
    return write_csv(path, head, rows)
