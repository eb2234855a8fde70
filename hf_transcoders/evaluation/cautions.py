"""One-line warnings about invalid or uncertain results, such as an error larger than that of the mean."""

import math
from collections.abc import Mapping

from ..models.configuration_transcoder import TranscoderConfig


# Steps below which a dictionary has hardly moved from its initial weights.
_FEW_STEPS = 100
# Held-out tokens below which an FVU is not known to two digits.
_FEW_TOKENS = 2_000
# Share of all features on one token above which they are not sparse.
_DENSE = 0.1
# An FVU that no normal training reaches, not even at its start.
_EXPLODED = 10.0
# Names of dictionaries in a line.
_MOST = 3


def cautions(
    configs: Mapping[str, TranscoderConfig],
    metrics: Mapping[str, Mapping[str, float]],
    tokens: int | None = None,
) -> dict[str, str]:
    """
    Lists reasons why the results of dictionaries are invalid or uncertain.

    Args:
        configs (`Mapping[str, TranscoderConfig]`): Configurations by name of the dictionary.
        metrics (`Mapping[str, Mapping[str, float]]`): Measured `fvu` and `l0` by name of the dictionary.
        tokens (`int`, *optional*): Number of held-out tokens that they were measured on.

    Returns:
        `dict[str, str]`: kind of the caution -> one line. Empty if there is none.
    """
    measured = {name: metrics.get(name) or {} for name in configs}
    fvus = {name: values["fvu"] for name, values in measured.items() if values.get("fvu") is not None}
    exploded = {name: fvu for name, fvu in fvus.items() if not fvu < _EXPLODED}
    useless = {name: fvu for name, fvu in fvus.items() if 1 <= fvu < _EXPLODED}
    dense = {
        name: values["l0"]
        for name, values in measured.items()
        if values.get("l0") is not None and values["l0"] > _DENSE * configs[name].num_features
    }
    summaries = {name: config.training_summary or {} for name, config in configs.items()}
    steps = {name: its["steps"] for name, its in summaries.items() if _is_count(its.get("steps"))}
    few = {name: count for name, count in steps.items() if count < _FEW_STEPS}
    lines = {}
    if exploded:
        lines["exploded"] = (
            f"{_which(exploded, configs)}: the loss has exploded (FVU {_span(exploded)}): train again with a lower learning rate."
        )
    if useless:
        lines["useless"] = (
            f"{_which(useless, configs)}: worse than predicting the mean activation (FVU {_span(useless)})."
        )
    if few:
        lines["steps"] = f"{_which(few, configs)}: trained for {_span(few)} steps only."
    if dense:
        lines["dense"] = (
            f"{_which(dense, configs)}: not sparse, with {_span(dense)} features active on a token"
            f"{_penalty([configs[name] for name in dense])}."
        )
    if fvus and tokens is not None and tokens < _FEW_TOKENS:
        lines["tokens"] = f"Measured on {tokens:,} held-out tokens only: the numbers are rough."
    return lines


def _penalty(configs: list[TranscoderConfig]) -> str:
    """The reason why features are dense, if their configurations show it."""
    if all(config.activation in ("relu", "gated") and not config.l1_coefficient for config in configs):
        return " (the L1 coefficient is 0)"
    if all(config.activation == "jumprelu" and not config.l0_coefficient for config in configs):
        return " (the L0 coefficient is 0)"
    return ""


def _which(found: Mapping[str, float], configs: Mapping[str, TranscoderConfig]) -> str:
    if len(found) == len(configs) > _MOST:
        return f"All {len(configs)} dictionaries"
    names = list(found)
    return ", ".join(names[:_MOST]) + (f" and {len(names) - _MOST} more" if len(names) > _MOST else "")


def _span(values: Mapping[str, float]) -> str:
    low, high = min(values.values()), max(values.values())
    shown = list(dict.fromkeys(f"{value:,}" if isinstance(value, int) else f"{value:.4g}" for value in (low, high)))
    return " to ".join(shown)


def _is_count(value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
