"""Choose among the hundreds of dictionaries that a repo can hold, by what the paths of their files say."""

import re
from collections.abc import Iterable
from typing import NamedTuple

from ..errors import TranscoderError
from ..text.printable import printable


class PathFacts(NamedTuple):
    """
    What a name such as `layer_12.width_16k.average_l0_71` says of a dictionary; `None` for what it does not say.

    Args:
        layer (`int`, *optional*): Layer that the dictionary belongs to.
        width (`str`, *optional*): Number of features in whole thousands or millions, such as `"16k"` for 16384.
        l0 (`int` or `str`, *optional*): Active features per token, or a word such as `"small"` for it.
    """

    layer: int | None = None
    width: str | None = None
    l0: int | str | None = None


def path_facts(name: str) -> PathFacts:
    """What a name says."""
    layer = re.search(r"(?:layer|layers|blocks|h)[_.]?(\d+)", name)
    width = re.search(r"width_(\d+)([km]?)(?![a-z0-9])", name)
    l0 = re.search(r"l0_(\d+|small|medium|big)(?![a-z0-9])", name)
    return PathFacts(
        int(layer[1]) if layer else None,
        (_label(int(width[1])) if not width[2] else width[1] + width[2]) if width else None,
        (int(l0[1]) if l0[1].isdecimal() else l0[1]) if l0 else None,
    )


def choose(
    names: Iterable[str],
    layers: int | Iterable[int] | None = None,
    width: int | str | None = None,
    l0: float | str | None = None,
) -> list[str]:
    """
    Those of several dictionaries that have the given layers and width, and of each layer and width the nearest L0.

    Args:
        names (`Iterable[str]`): Names of the dictionaries.
        layers (`int` or `Iterable[int]`, *optional*): Layers.
        width (`int` or `str`, *optional*): Number of features, such as 16384 or `"16k"`.
        l0 (`float` or `str`, *optional*): Active features per token, or `"small"`, `"medium"` or `"big"`.

    Raises:
        [`TranscoderError`]: no dictionary fits; the message lists the choices.
    """
    facts = {name: path_facts(name) for name in names}
    wanted = [layers] if isinstance(layers, int) else layers if layers is None else list(layers)
    size = _wanted_width(width)
    kept = {
        name: fact
        for name, fact in facts.items()
        if (wanted is None or fact.layer in wanted) and (size is None or fact.width == size)
    }
    if isinstance(l0, str):
        kept = {name: fact for name, fact in kept.items() if fact.l0 == l0}
    elif l0 is not None:
        nearest: dict[tuple, tuple[float, str]] = {}
        for name, fact in kept.items():
            if isinstance(fact.l0, int):
                # Dictionaries at several places of a layer differ in the part of the name before the width.
                group = (re.sub(r"width_.*|[._-]?(?:average_)?l0_.*", "", name), fact.layer, fact.width)
                nearest[group] = min(nearest.get(group, (float("inf"), "")), (abs(fact.l0 - l0), name))
        kept = {name: facts[name] for _, name in nearest.values()}
    if not kept or (wanted is not None and (lacking := set(wanted) - {fact.layer for fact in kept.values()})):
        missing = f" for layer {', '.join(map(str, sorted(lacking)))}" if kept else ""
        raise TranscoderError(
            f"No dictionary has what was asked for{missing} ({_asked(layers, width, l0)}): there are {_choices(facts.values())}."
        )
    return list(kept)


def _wanted_width(width: int | str | None) -> str | None:
    if width is None:
        return None
    text = str(width).lower()
    if text.isdecimal():
        return _label(int(text))
    if re.fullmatch(r"\d+[km]", text) is None:
        raise TranscoderError(
            f"`width` is '{printable(width)[:40]}', but must be a number of features such as 16384 or '16k'."
        )
    return text


def _label(width: int) -> str:
    """A number of features as repos name it: 16384 is 16k, and 262144 is 262k."""
    if width < 1000:
        return str(width)
    return f"{width // 1000}k" if width < 10**6 else f"{width // 10**6}m"


def _asked(layers, width, l0) -> str:
    said = {"layers": layers, "width": width, "l0": l0}
    return printable(", ".join(f"{name}={value!r}" for name, value in said.items() if value is not None))[:200]


def _choices(facts: Iterable[PathFacts]) -> str:
    facts = list(facts)
    parts = []
    for name in PathFacts._fields:
        values = {getattr(fact, name) for fact in facts} - {None}
        ordered = sorted(values, key=lambda value: (isinstance(value, str), value))
        if ordered:
            parts.append(f"{name} {', '.join(map(str, ordered[:12]))}{' ...' if len(ordered) > 12 else ''}")
    return "; ".join(parts) or "dictionaries whose names say neither layer nor width nor L0"
