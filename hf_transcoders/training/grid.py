"""A grid of dictionaries: every combination of layers, kinds, widths and sparsities."""

import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from huggingface_hub.errors import StrictDataclassError

from ..errors import TranscoderError
from ..lm.architectures import site_width
from ..lm.wrappers import takes_model
from ..models.configuration_transcoder import TranscoderConfig
from ..models.set_index import dictionary_name


# Options that only some activations have.
_ACTIVATIONS_OF = {
    "k": ("topk", "batchtopk"),
    "l1_coefficient": ("relu", "gated"),
    "l0_coefficient": ("jumprelu",),
    "target_l0": ("jumprelu",),
}
# Options in every name; others are in names if they vary.
_IN_EVERY_NAME = {"activation", "num_features", "skip_connection", *_ACTIVATIONS_OF}

#: fp32 weights, gradients, and Adam's two averages.
TRAINING_BYTES_PER_PARAMETER = 16


@dataclass
class Grid:
    """
    Result of [`expand_grid`].

    Args:
        configs (`dict[str, TranscoderConfig]`): Configurations by name.
        left_out (`dict[str, str]`): Impossible combination -> reason.
    """

    configs: dict[str, TranscoderConfig]
    left_out: dict[str, str]


def mlp_sites(layer: int, kind: str) -> tuple[str, str]:
    """Input and output sites of a `"transcoder"` or an `"sae"` of a layer's MLP."""
    write = f"layers.{layer}.mlp.branch"
    return (write if kind == "sae" else f"layers.{layer}.mlp.in"), write


@takes_model
def dictionary_config(base_model, read: str, write: str, **kwargs) -> TranscoderConfig:
    """Makes a configuration as [`TranscoderConfig.for_model`], with the widths of the base model at the sites."""
    widths = {"d_in": site_width(base_model, read), "d_out": site_width(base_model, write)}
    known = {name: width for name, width in widths.items() if width is not None}
    return TranscoderConfig.for_model(base_model, read, write, **{**known, **kwargs})


@takes_model
def expand_grid(base_model, sites: Iterable[tuple[str, str]], **options) -> Grid:
    """
    Makes every combination of sites and options, with readable names such as `layers.8.mlp.transcoder.topk32.n4608`.

    Options that an activation does not have (such as `k` for `"relu"`), or an SAE (`skip_connection`), are left out of its
    combinations, so `activation=["topk", "relu"], k=[16, 32], l1_coefficient=[1e-3]` makes three.

    Args:
        base_model ([`~transformers.PreTrainedModel`]):
            Language model.
        sites (`Iterable[tuple[str, str]]`):
            Input and output sites, as returned by [`mlp_sites`].
        options:
            Arguments of [`TranscoderConfig`], each a value or a list of values.

    Returns:
        [`Grid`]

    Raises:
        [`TranscoderError`]: a site does not exist, an option has no effect on any combination, or no combination is possible.
    """
    options = {name: _as_list(value) for name, value in options.items()}
    options.setdefault("activation", ["topk"])
    varying = [name for name, values in options.items() if len(values) > 1 and name not in _IN_EVERY_NAME]
    configs: dict[str, TranscoderConfig] = {}
    left_out: dict[str, str] = {}
    used: set[str] = set()
    for read, write in sites:
        for site in (read, write):
            site_width(base_model, site)  # Raises an error if the site does not exist.
        for values in itertools.product(*options.values()):
            chosen = _that_apply(dict(zip(options, values, strict=True)), is_sae=read == write)
            used |= chosen.keys()
            name = _name(read, write, chosen, varying)
            if name in configs or name in left_out:
                continue
            try:
                configs[name] = dictionary_config(base_model, read, write, **chosen)
            except TranscoderError as error:
                left_out[name] = str(error)
            except StrictDataclassError as error:
                left_out[name] = " ".join(str(error).split())
    for name, values in options.items():
        if name not in used and any(values):
            needed = " or ".join(map(repr, _ACTIVATIONS_OF[name])) if name in _ACTIVATIONS_OF else "a transcoder"
            raise TranscoderError(
                f"`{name}` has no meaning for any of these dictionaries: leave it out, or add {needed}."
            )
    if not configs:
        reasons = "; ".join(dict.fromkeys(left_out.values())) or "there are no sites"
        raise TranscoderError(f"No combination of these options can be trained: {reasons}")
    return Grid(configs, left_out)


def in_groups(names: Sequence[str], size: int | None) -> list[list[str]]:
    """Names in groups of at most `size`, or in one group if it is `None`."""
    if size is not None and size < 1:
        raise TranscoderError(f"The size of a group is {size}; give a number of at least 1.")
    size = size or len(names)
    return [list(names[start : start + size]) for start in range(0, len(names), size)]


def _as_list(value) -> list:
    return list(value) if isinstance(value, list | tuple) else [value]


def _that_apply(options: Mapping[str, Any], is_sae: bool) -> dict[str, Any]:
    activation = options["activation"]
    return {
        name: value
        for name, value in options.items()
        if activation in _ACTIVATIONS_OF.get(name, (activation,)) and not (name == "skip_connection" and is_sae)
    }


def _name(read: str, write: str, options: Mapping[str, Any], varying: Sequence[str]) -> str:
    place = TranscoderConfig(
        input_site=read, output_site=write, skip_connection=bool(options.get("skip_connection", False))
    )
    activation, k = options["activation"], options.get("k")
    sparsity = [f"{activation}{(k or 32) if activation in _ACTIVATIONS_OF['k'] else ''}"]
    for option, word in (("l1_coefficient", "l1"), ("l0_coefficient", "l0"), ("target_l0", "target")):
        if options.get(option):
            sparsity.append(f"{word}-{_number(options[option])}")
    words = ["-".join(sparsity), f"n{options.get('num_features', place.num_features)}"]
    words += [
        f"{option}-{options[option]}" if isinstance(options[option], bool) else str(options[option])
        for option in varying
        if option in options
    ]
    return ".".join([dictionary_name(place), *(re.sub(r"[^\w-]+", "-", word).strip("-") for word in words)])


def _number(value: float) -> str:
    """A number without a dot, which separates the parts of a name: `32`, `1e-3`, `15e-4`."""
    _, digits, exponent = Decimal(repr(value)).normalize().as_tuple()
    if exponent >= 0:
        return f"{Decimal(repr(value)):.0f}"
    return "".join(map(str, digits)) + f"e{exponent}"
