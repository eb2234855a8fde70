"""Names of kinds, sites, types and lists on a card."""

import json
import re
from collections.abc import Iterable

import torch

from ...lm.sites import Site
from ...models.configuration_transcoder import TranscoderConfig
from ...models.cross_layer.configuration_cross_layer import CrossLayerSourceConfig
from ...text.markdown import Markdown, code, escape


_PLACES = {
    "resid_pre": "the residual stream entering layer {}",
    "attn.in": "the input of layer {}'s attention, after its norm",
    "attn.out": "the output of layer {}'s attention module",
    "attn.branch": "what layer {}'s attention adds to the residual stream",
    "resid_mid": "the residual stream of layer {} between attention and MLP",
    "mlp.in": "the input of layer {}'s MLP, after its norm",
    "mlp.out": "the output of layer {}'s MLP module",
    "mlp.branch": "what layer {}'s MLP adds to the residual stream",
    "resid_post": "the residual stream leaving layer {}",
}


def kind(config: TranscoderConfig) -> str:
    """The kind of a dictionary: SAE, transcoder, skip transcoder or layer of a cross-layer transcoder."""
    if isinstance(config, CrossLayerSourceConfig):
        return "cross-layer transcoder layer"
    if config.is_autoencoder:
        return "SAE"
    return "skip transcoder" if config.skip_connection else "transcoder"


def place(site: str | None) -> Markdown:
    """A site as a phrase."""
    if site is None:
        return Markdown("activations of a place that was not recorded")
    parsed = Site.parse(site)
    if parsed.module is not None:
        return Markdown(f"the {'input' if parsed.point == 'in' else 'output'} of the module {code(parsed.module)}")
    return Markdown(_PLACES[parsed.point].format(parsed.layer))


def place_and_name(site: str | None) -> Markdown:
    return Markdown(f"{place(site)} ({code(site)})") if site else place(site)


def written_places(config: TranscoderConfig) -> Markdown:
    """The sites that a dictionary writes at as a phrase."""
    first = place_and_name(config.output_site)
    later = config.output_sites[1:]
    return Markdown(f"{first}, and {listed(map(code, later))}") if later else first


def site_and_width(site: str | None, width: int) -> Markdown:
    return Markdown(f"{code(site) + ', ' if site else ''}{width} wide")


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def listed(words: Iterable[str]) -> Markdown:
    """`a`, `a and b`, `a, b and c`."""
    words = [escape(word) for word in words]
    return Markdown(" and ".join(filter(None, (", ".join(words[:-1]), *words[-1:]))))


def literal(text: str) -> str:
    """A text as a Python (and JSON) literal, on one line."""
    return json.dumps(text, ensure_ascii=False)


def slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-") or "unnamed"
