"""Describe how the dictionaries of Pareto fronts were measured, and how that differs."""

from collections.abc import Mapping, Sequence
from typing import Any

from .fronts import PROTOCOL_FACTS, MeasuredDictionary, ParetoFronts, protocol_differences


def warning(fronts: Sequence[ParetoFronts]) -> str | None:
    """Return a warning if metrics were measured in different ways, or in unknown ways."""
    mixed = [group for group in fronts if group.differences]
    if mixed:
        return f"Measured in different ways, but put on one front: {_describe(mixed[0].differences)}."
    if len(fronts) > 1:
        differences = protocol_differences([group.protocol for group in fronts])
        return (
            f"Measured in {len(fronts)} different ways, each with separate fronts: "
            f"{_describe(differences) or 'the protocols were not recorded'}."
        )
    if fronts and fronts[0].protocol is None:
        return "The protocol of these measurements was not recorded."
    return None


def heading(group: ParetoFronts) -> str:
    """Describe in a few words how the dictionaries of a group were measured."""
    if group.differences:
        return "Measured in different ways"
    if group.protocol is None:
        runs = sorted({dictionary.run for dictionary in group.dictionaries})
        return f"{', '.join(runs)}: protocol not recorded"
    tokens = group.protocol.get("fidelity_tokens")
    return f"Measured on {group.protocol.get('dataset') or 'unnamed text'}" + (
        f", {tokens:,} tokens" if tokens else ""
    )


def origin(dictionary: MeasuredDictionary) -> str:
    return dictionary.source + (f", step {dictionary.step:,}" if dictionary.step is not None else "")


def protocol_lines(protocol) -> dict[str, str]:
    facts = protocol or {}
    return {name: _value(facts[key]) for key, name in PROTOCOL_FACTS.items() if facts.get(key) is not None}


def _describe(differences: Mapping[str, Sequence[Any]]) -> str:
    return ", ".join(f"{fact} ({' / '.join(map(_value, values))})" for fact, values in differences.items())


def _value(value) -> str:
    if value is None:
        return "not recorded"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(map(str, value[:5])) + (f" and {len(value) - 5} more" if len(value) > 5 else "") or "none"
    return f"{value:,}" if isinstance(value, int) else str(value)
