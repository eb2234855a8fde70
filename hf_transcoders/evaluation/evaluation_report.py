"""The report of an evaluation: metrics and protocol."""

import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..errors import TranscoderError
from ..files import atomic_directory, read_settled, signature, write_text
from ..models.saved_files import parse_saved
from ..models.set_index import INDEX_NAME
from ..models.transcoder_set import set_folders
from ..text.columns import aligned, paired
from ..text.markdown import escape, table
from ..text.printable import printable
from ..text.strict_json import finite, read_json, to_json
from .report_file import check_report


#: Metric -> its heading in tables, in their order.
METRICS = {
    "l0": "L0",
    "l1": "L1",
    "mse": "MSE",
    "normalized_mse": "normalized MSE",
    "fvu": "FVU",
    "explained_variance": "explained variance",
    "cosine": "cosine",
    "l2_ratio": "L2 ratio",
    "relative_reconstruction_bias": "relative reconstruction bias",
    "ce_original": "CE original",
    "ce_spliced": "CE spliced",
    "ce_zero_ablated": "CE zero-ablated",
    "ce_mean_ablated": "CE mean-ablated",
    "ce_recovered_zero": "CE recovered (zero)",
    "ce_recovered_mean": "CE recovered (mean)",
    "kl": "KL to original",
    "kl_zero_ablated": "KL zero-ablated",
    "kl_mean_ablated": "KL mean-ablated",
    "top1_agreement": "top-1 agreement",
    "top1_agreement_zero_ablated": "top-1 agreement zero-ablated",
    "top1_agreement_mean_ablated": "top-1 agreement mean-ablated",
    "dead_fraction": "dead fraction",
}

#: Metrics in tables with one row per dictionary.
HEADLINE_METRICS = (
    "l0",
    "fvu",
    "cosine",
    "ce_recovered_zero",
    "ce_recovered_mean",
    "kl",
    "top1_agreement",
    "dead_fraction",
)

#: Metrics of the language model with a dictionary spliced in, and with its output ablated.
REPLACEMENT_METRICS = (
    "ce_spliced",
    "ce_mean_ablated",
    "ce_zero_ablated",
    "kl",
    "kl_mean_ablated",
    "kl_zero_ablated",
    "top1_agreement",
    "top1_agreement_mean_ablated",
    "top1_agreement_zero_ablated",
)

# Finite for every intact dictionary; the others are ratios whose denominator may be 0.
_ALWAYS_FINITE = ("l0", "l1", "mse", "ce_original", "ce_spliced", "ce_zero_ablated", "ce_mean_ablated", "kl")

#: Name for all dictionaries spliced in at once.
TOGETHER = "all together"

# Largest number of dictionaries with one column each and all metrics; more have one row each with the headline metrics.
_NARROW = 4


@dataclass
class EvaluationReport:
    """The metrics of one evaluation.

    Args:
        dictionaries (`dict[str, dict]`):
            `metrics` (`dict[str, float]`, named as in [`~evaluation_report.METRICS`]), `density_histogram` and `config`
            (sites, size and activation) of each dictionary.
        protocol (`dict`):
            Conditions of the measurement: model and revision, data, tokens, positions left out, ablations, precision,
            versions.
        together (`dict[str, float]`, *optional*):
            Loss metrics with all dictionaries spliced in at once, against all their outputs ablated at once.
    """

    dictionaries: dict[str, dict[str, Any]]
    protocol: dict[str, Any]
    together: dict[str, float] | None = None

    def of(self, name: str) -> dict[str, Any]:
        """
        The evaluation of one dictionary, for the field `evaluation` of its configuration.

        Args:
            name (`str`): Name of the dictionary in the report.

        Returns:
            `dict`: `metrics`, `density_histogram` and `protocol`, with `None` for numbers that are not finite.
        """
        entry = self.dictionaries[name]
        return finite(
            {
                "metrics": entry["metrics"],
                "density_histogram": entry["density_histogram"],
                "protocol": self.protocol,
            }
        )

    def save_into(self, folder: str | os.PathLike) -> None:
        """
        Writes the evaluation into the `config.json` of saved dictionaries, in the field `evaluation`.

        Args:
            folder (`str` or `os.PathLike`): Folder of the evaluated dictionary or set.
        """
        folder = Path(folder)
        before: dict[Path, tuple | None] = {}

        def read(opening):
            if (folder / INDEX_NAME).exists():
                places = set_folders(folder)
            else:
                # A single dictionary has no name of its own.
                places = dict.fromkeys(self.dictionaries if len(self.dictionaries) == 1 else (), folder)
            paths = {name: places[name] / "config.json" for name in self.dictionaries if name in places}
            if missing := [name for name in self.dictionaries if name not in paths or not paths[name].exists()]:
                raise TranscoderError(
                    f"{folder} holds no dictionary {', '.join(missing)}: give the folder of the dictionaries that were measured."
                )
            before.update({path: signature(path) for path in paths.values()})
            return {name: (path, parse_saved(opening(path).read_bytes(), str(path))) for name, path in paths.items()}

        configs = read_settled(folder, read)
        # All files at once, and only if the folder was not saved again meanwhile.
        with atomic_directory(folder, unchanged=before) as partial:
            for name, (path, config) in configs.items():
                target = partial / path.relative_to(folder)
                target.parent.mkdir(parents=True, exist_ok=True)
                config = config | {"evaluation": self.of(name)}
                target.write_text(
                    json.dumps(config, indent=2, sort_keys=True, allow_nan=False) + "\n", encoding="utf-8"
                )

    @property
    def warnings(self) -> list[str]:
        """A sentence for each dictionary whose metrics are not finite."""
        found = []
        for name, values in self.columns().items():
            numbers = {metric: values[metric] for metric in _ALWAYS_FINITE if metric in values}
            broken = [METRICS[m] for m, value in numbers.items() if value is None or not math.isfinite(value)]
            if broken:
                found.append(
                    f"'{name}' has no finite {', '.join(broken)}: look for weights that are not numbers in it and in the "
                    "language model, or measure in float32."
                )
        return found

    @property
    def metrics(self) -> dict[str, dict[str, float]]:
        """Metrics by dictionary."""
        return {name: entry["metrics"] for name, entry in self.dictionaries.items()}

    def to_dict(self) -> dict[str, Any]:
        """The report as plain values, with `None` for numbers that are not finite, and `warnings` if there are any."""
        content = finite(asdict(self))
        return {**content, "warnings": self.warnings} if self.warnings else content

    def save_json(self, path: str | os.PathLike) -> Path:
        """Write [`~EvaluationReport.to_dict`] as JSON."""
        return write_text(path, to_json(self.to_dict()) + "\n")

    @classmethod
    def load_json(cls, path: str | os.PathLike) -> "EvaluationReport":
        """Read a report written by [`~EvaluationReport.save_json`]; numbers that were not finite are `nan`.

        Raises:
            [`TranscoderError`]: the file cannot be read, or is not a report.
        """
        content = read_json(path)
        # Computed from the metrics.
        content.pop("warnings", None)
        check_report(content, str(path), TOGETHER)
        report = cls(**content)
        for metrics in report.columns().values():
            metrics.update({name: float("nan") for name, value in metrics.items() if value is None})
        return report

    def columns(self) -> dict[str, dict[str, float]]:
        """Metrics by dictionary, and those of the whole set under `"all together"`."""
        columns = self.metrics
        if self.together is not None:
            columns[TOGETHER] = self.together
        return columns

    def to_text(self) -> str:
        """Metrics and protocol as aligned text for a terminal."""
        head, *rows = self._cells()
        parts = [aligned(head, rows)]
        parts += [f"{title}:\n\n{aligned(cells[0], cells[1:])}" for title, cells in self._replacement()]
        parts.append(paired(self.protocol_lines()))
        # Last, next to the prompt of the terminal.
        return "\n\n".join([*parts, *(f"WARNING: {printable(text)}" for text in self.warnings)])

    __str__ = to_text

    def markdown(self) -> str:
        """Metrics and protocol as Markdown."""
        head, *rows = self._cells()
        parts = [table(head, rows)]
        parts += [f"{title}:\n\n{table(cells[0], cells[1:])}" for title, cells in self._replacement()]
        facts = "; ".join(f"{fact}: {value}" for fact, value in self.protocol_lines().items())
        parts.append(f"**Protocol.** {escape(facts)}.")
        return "\n\n".join([*parts, *(f"> [!WARNING]\n> {escape(text)}" for text in self.warnings)])

    def protocol_lines(self) -> dict[str, str]:
        """The protocol as readable facts."""
        protocol = self.protocol
        revision = f" @ {protocol['base_model_revision']}" if protocol["base_model_revision"] else ""
        split = f", {protocol['dataset_split']}" if protocol["dataset_split"] else ""
        special = protocol["special_token_ids"]
        left_out = [f"the first {protocol['skip_first']} of each block"] if protocol["skip_first"] else []
        if special:
            ids = ", ".join(map(str, special[:5]))
            left_out.append(f"token ids {ids}" + (f" and {len(special) - 5} more" if len(special) > 5 else ""))
        lines = {
            "base model": f"{protocol['base_model'] or 'unnamed'}{revision}",
            "data": f"{protocol['dataset'] or 'unnamed'}{split}",
            "tokens": f"{protocol['fidelity_tokens']:,} for fidelity and dead features, "
            f"{protocol['loss_tokens']:,} for losses",
            "blocks": f"{block_lengths(protocol)} tokens, "
            + ("each beginning with BOS" if protocol["begins_with_bos"] else "without BOS"),
            "left out and unreplaced": " and ".join(left_out) or "nothing",
            "ablations": protocol["ablation"],
            "precision": f"{protocol['dtype']} on {protocol['device']}",
            "versions": ", ".join(f"{name} {version}" for name, version in protocol["versions"].items()),
        }
        return lines

    def _cells(self) -> list[list[str]]:
        columns = self.columns()
        if len(columns) <= _NARROW:
            head = ["metric", *columns]
            rows = [
                [METRICS[m], *(format_number(values.get(m)) for values in columns.values())]
                for m in self._measured(METRICS)
            ]
            return [head, *rows]
        return self._row_each(HEADLINE_METRICS)

    def _replacement(self) -> list[tuple[str, list[list[str]]]]:
        """A table of replacement metrics, for a set whose first table has the headline metrics only."""
        if self.together is None or len(self.columns()) <= _NARROW:
            return []
        original = format_number(self.together["ce_original"])
        title = (
            f"The language model (cross-entropy {original}) with each of them alone and with all of them in place, and "
            "with the same outputs held at their mean or at zero instead"
        )
        return [(title, self._row_each(self._measured(REPLACEMENT_METRICS)))]

    def _row_each(self, metrics: Iterable[str]) -> list[list[str]]:
        head = ["dictionary", *(METRICS[metric] for metric in metrics)]
        return [
            head,
            *([name, *(format_number(values.get(m)) for m in metrics)] for name, values in self.columns().items()),
        ]

    def _measured(self, metrics: Iterable[str]) -> list[str]:
        """The metrics that some dictionary has: reports of earlier versions lack some of them."""
        return [metric for metric in metrics if any(metric in values for values in self.columns().values())]


def block_lengths(protocol: Mapping[str, Any]) -> str:
    """Number of tokens in the blocks of a measurement, such as `128` or `12 to 128`."""
    longest = protocol["sequence_length"]
    shortest = protocol.get("shortest_sequence", longest)
    return f"{longest}" if shortest == longest else f"{shortest} to {longest}"


def format_number(value: float | None) -> str:
    """A number with four significant digits, or a dash if it was not measured."""
    if value is None:
        return "-"
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    if abs(value) < 1e-3:
        return f"{value:.2e}"
    whole_digits = max(0, math.floor(math.log10(abs(value))) + 1)
    return f"{value:,.{max(0, 4 - whole_digits)}f}"
