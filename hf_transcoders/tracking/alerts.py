"""Alert rules for training metrics."""

import math
from collections import defaultdict, deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from statistics import median

from .tracker import Alert


NOT_FINITE, LOSS_SPIKE, DEAD_FEATURES = "Not a finite number", "Loss spike", "Dead features"


@dataclass
class AlertThresholds:
    """
    Thresholds of alerts.

    Args:
        spike_factor (`float`, *optional*, defaults to 3.0):
            Factor over the median loss of the last `window` logs that is a spike. Logs are means over `logging_steps`
            steps, so a single bad step must be far worse.
        dead_rise (`float`, *optional*, defaults to 0.2):
            Increase of the share of dead features over its lowest value in the last `window` logs that raises an alert.
        window (`int`, *optional*, defaults to 10):
            Number of earlier logs to compare with. Spikes need at least half as many.
    """

    spike_factor: float = 3.0
    dead_rise: float = 0.2
    window: int = 10


class AlertWatch:
    """
    Checks the scalars of each log. Alerts fire once when a condition starts, and re-arm when it clears.

    Spikes are detected in `<dictionary>/mse`, whose scale does not depend on penalties and warm-up, or in `loss` without
    dictionaries.

    Args:
        thresholds ([`AlertThresholds`]): Thresholds of alerts.
        quiet_steps (`int`, *optional*, defaults to 0):
            Number of steps at the start without alerts for spikes, because errors rise while sparsity is warmed up.
    """

    def __init__(self, thresholds: AlertThresholds, quiet_steps: int = 0):
        self.thresholds = thresholds
        self.quiet_steps = quiet_steps
        self._history: dict[str, deque[float]] = defaultdict(lambda: deque(maxlen=thresholds.window))
        self._active: set[tuple[str, str]] = set()

    def replay(self, lines: Iterable[Mapping[str, float]]) -> None:
        """Replays the recorded logs of a resumed run, so that no alert fires twice."""
        for line in lines:
            # NaN is null in files.
            values = {name: math.nan if value is None else value for name, value in line.items() if name != "time"}
            self.check(values.pop("step"), values)

    def check(self, step: int, values: Mapping[str, float]) -> list[Alert]:
        """
        Returns the alerts that start with a log.

        Args:
            step (`int`): Optimizer step.
            values (`Mapping[str, float]`): Metrics by name (`train/<dictionary>/mse`).

        Returns:
            `list[Alert]`
        """
        alerts = []
        parts: dict[str, dict[str, float]] = defaultdict(dict)
        for name, value in values.items():
            part, _, metric = name.rpartition("/")
            if part.split("/")[0] == "train":
                parts[part][metric] = value
        has_dictionaries = any("mse" in metrics for metrics in parts.values())
        for part, metrics in parts.items():
            where = part.removeprefix("train").removeprefix("/") or "the run"
            if watched := {metric: metrics[metric] for metric in ("loss", "fvu") if metric in metrics}:
                wrong = ", ".join(f"{metric} is {v}" for metric, v in watched.items() if not math.isfinite(v))
                alerts += self._begin(bool(wrong), (NOT_FINITE, where), "error", f"{wrong} in {where} at step {step}.")
            metric = "mse" if has_dictionaries else "loss"
            value = metrics.get(metric, math.nan)
            if math.isfinite(value) and step > self.quiet_steps:
                history = self._history[f"{part}/{metric}"]
                usual = median(history) if len(history) >= max(1, self.thresholds.window // 2) else math.inf
                alerts += self._begin(
                    value > self.thresholds.spike_factor * usual,
                    (LOSS_SPIKE, where),
                    "warn",
                    f"{metric} of {where} is {value:.4g} at step {step}; the median of the logs before is {usual:.4g}.",
                )
                history.append(value)
            if "dead_fraction" in metrics:
                value, history = metrics["dead_fraction"], self._history[f"{part}/dead_fraction"]
                lowest = min(history, default=value)
                alerts += self._begin(
                    value - lowest >= self.thresholds.dead_rise,
                    (DEAD_FEATURES, where),
                    "warn",
                    f"{value:.1%} of the features of {where} are dead at step {step}, after {lowest:.1%} shortly before.",
                )
                history.append(value)
        return alerts

    def _begin(self, condition: bool, key: tuple[str, str], level, text: str) -> list[Alert]:
        if not condition:
            self._active.discard(key)
            return []
        if key in self._active:
            return []
        self._active.add(key)
        return [Alert(level, key[0], text)]
