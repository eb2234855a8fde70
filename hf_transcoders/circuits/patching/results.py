"""Results of patching: the metric of each patch and prompt, with effects and intervals."""

import itertools
import os
from dataclasses import dataclass, field

import torch

from ...errors import TranscoderError
from ...files import write_csv, write_text
from ...tasks.answer_metrics import estimate
from ...text.checked import checked, entries, entry
from ...text.printable import printable
from ...text.strict_json import finite, read_json, to_json


# The layer and number of a head.
Head = tuple[int, int]


@dataclass
class PatchResult:
    """Metrics of patched runs for each place and prompt. A place is one patched activation.

    Args:
        values (`torch.Tensor`): `(places..., prompts)`: the metric of each patched run, NaN if there is none.
        base (`torch.Tensor` of shape `(prompts,)`): The metric of the base run, without patches.
        source (`torch.Tensor` of shape `(prompts,)`, *optional*): The metric of the run that the patches come from.
        axes (`dict[str, list[str]]`): Name of each axis of the places -> labels along the axis.
        metric (`str`): Name of the metric.
        protocol (`dict`): Settings of the measurement, as JSON.
    """

    values: torch.Tensor
    base: torch.Tensor
    source: torch.Tensor | None
    axes: dict[str, list[str]]
    metric: str
    protocol: dict = field(default_factory=dict)

    @property
    def shape(self) -> tuple[int, ...]:
        """The number of places along each axis."""
        return tuple(self.values.shape[:-1])

    @property
    def effects(self) -> torch.Tensor:
        """The mean change of the metric by each patch.

        If the patches come from a source run, the change is a share of the way to it: 0 is the base run and 1 the source
        run (`(patched - base) / (source - base)`, a ratio of means over prompts). Otherwise it is in the unit of the metric.
        """
        change = self.values.double().mean(-1) - self.base.double().mean()
        return change if self.source is None else change / (self.source.double().mean() - self.base.double().mean())

    def intervals(
        self, confidence: float = 0.95, resamples: int = 1000, seed: int = 0
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute bootstrap intervals of the effects over prompts, which are drawn with replacement.

        Args:
            confidence (`float`, *optional*, defaults to 0.95): Share of intervals that contain the true effect.
            resamples (`int`, *optional*, defaults to 1000): Number of resamples.
            seed (`int`, *optional*, defaults to 0): Seed for the resamples.

        Returns:
            `tuple[torch.Tensor, torch.Tensor]`: the lower and upper ends, each of the shape of `effects`.
        """
        if not 0 < confidence < 1:
            raise TranscoderError(f"confidence is {confidence}, but must be between 0 and 1.")
        weights = bootstrap_weights(len(self.base), resamples, torch.Generator().manual_seed(seed))
        change = (self.values.double() - self.base.double()).flatten(0, -2) @ weights.T
        if self.source is not None:
            change /= weights @ (self.source.double() - self.base.double())
        ends = torch.tensor([(1 - confidence) / 2, (1 + confidence) / 2], dtype=torch.float64)
        low, high = change.quantile(ends, dim=1)
        return low.view(self.shape), high.view(self.shape)

    @property
    def warning(self) -> str | None:
        """A warning if base and source runs do not differ, so that effects are shares of nothing; otherwise `None`."""
        if self.source is None:
            return None
        change = estimate(self.source.double() - self.base.double())
        if not change.low <= 0 <= change.high:
            return None
        return (
            f"The {self.metric.replace('_', ' ')} of base and source runs does not differ: the 95% interval of the difference, "
            f"{change}, includes 0. Effects are shares of this difference, so that they may be of any size."
        )

    def top(self, k: int = 10, largest: bool | None = None) -> list[dict]:
        """Find the `k` places with the greatest effects.

        Args:
            k (`int`, *optional*, defaults to 10): Number of places.
            largest (`bool`, *optional*): Whether to rank by the highest or the lowest effects. By default they are ranked by
                magnitude.

        Returns:
            `list[dict]`: the label on each axis, and `effect`.
        """
        effects = self.effects.flatten()
        score = {None: effects.abs(), True: effects, False: -effects}[largest]
        score = score.nan_to_num(nan=-torch.inf)
        names = list(self.axes)
        found = []
        for index in score.topk(min(k, len(score))).indices.tolist():
            place = torch.unravel_index(torch.tensor(index), self.shape)
            cell = {name: self.axes[name][int(at)] for name, at in zip(names, place, strict=True)}
            found.append({**cell, "effect": effects[index].item()})
        return found

    def to_dict(self) -> dict:
        """All fields and effects as JSON, including the values of each prompt."""
        return {
            "axes": self.axes,
            "metric": self.metric,
            "protocol": self.protocol,
            "warning": self.warning,
            "effects": finite(self.effects.tolist()),
            "base": finite(self.base.tolist()),
            "source": None if self.source is None else finite(self.source.tolist()),
            "values": finite(self.values.tolist()),
        }

    def to_json(self, path: str | os.PathLike) -> None:
        """Write the result to a JSON file, for [`PatchResult.from_json`]."""
        write_text(path, to_json(self.to_dict(), indent=None))

    @classmethod
    def from_json(cls, path: str | os.PathLike) -> "PatchResult":
        """Read a file of [`PatchResult.to_json`].

        Raises:
            [`TranscoderError`]: the file cannot be read, or its parts do not fit each other.
        """
        data, file = read_json(path), str(path)
        axes = entry(data, "axes", dict, file)
        for name in axes:
            if not entries(axes, name, str, file):
                raise TranscoderError(f"The axis '{printable(name)}' in {printable(file)} has no cells: patch again.")
        if not axes or not entry(data, "base", list, file):
            raise TranscoderError(f"{printable(file)} has no {'prompts' if axes else 'axes'}: patch again.")
        prompts = (len(data["base"]),)
        shape = (*map(len, axes.values()), *prompts)
        source = entry(data, "source", list, file, null=True)
        return cls(
            _tensor(entry(data, "values", list, file), shape, f"'values' in {file}"),
            _tensor(data["base"], prompts, f"'base' in {file}"),
            None if source is None else _tensor(source, prompts, f"'source' in {file}"),
            axes,
            entry(data, "metric", str, file),
            entry(data, "protocol", dict, file),
        )

    def to_csv(self, path: str | os.PathLike) -> None:
        """Write a CSV file with one line for each place: its labels, effect, interval and mean metric."""
        low, high = self.intervals()
        columns = [each.flatten().tolist() for each in (self.effects, low, high, self.values.double().mean(-1))]
        cells = itertools.product(*self.axes.values())
        rows = [[*cell, *numbers] for cell, *numbers in zip(cells, *columns, strict=True)]
        write_csv(path, [*self.axes, "effect", "low", "high", self.metric], rows)


def bootstrap_weights(prompts: int, resamples: int, generator: torch.Generator) -> torch.Tensor:
    """Draw prompts with replacement.

    Args:
        prompts (`int`): Number of prompts.
        resamples (`int`): Number of resamples.
        generator (`torch.Generator`): The random generator.

    Returns:
        `torch.Tensor` of shape `(resamples, prompts)` in fp64: the share of each prompt in each resample.
    """
    draws = torch.randint(prompts, (resamples, prompts), generator=generator)
    weights = torch.zeros(resamples, prompts, dtype=torch.float64)
    return weights.scatter_add_(1, draws, torch.ones_like(draws, dtype=torch.float64)).div_(prompts)


def _tensor(numbers, shape, where):
    """Nested lists of numbers as a tensor, with NaN for `None`."""

    def filled(each, sizes):
        if not sizes:
            return float("nan") if checked(each, float, f"A number of {where}", null=True) is None else float(each)
        if len(checked(each, list, f"A part of {where}")) != sizes[0]:
            raise TranscoderError(
                f"{printable(where)} has {len(each)} numbers or parts where it needs {sizes[0]}: the file is damaged."
            )
        return [filled(one, sizes[1:]) for one in each]

    return torch.tensor(filled(numbers, shape))
