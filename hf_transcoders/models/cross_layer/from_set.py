"""Make a cross-layer transcoder from a set of transcoders of single layers."""

import re
from collections.abc import Mapping

import torch

from ...errors import TranscoderError
from ..configuration_transcoder import TranscoderConfig
from ..modeling_transcoder import TranscoderModel


# Fields in which the transcoders of a set may differ.
_OWN = {"input_site", "output_site", "target_variance", "training_summary", "evaluation"}


@torch.no_grad()
def from_set(cls, transcoders: Mapping[str, TranscoderModel], window: int | None):
    """See [`CrossLayerTranscoder.from_set`]."""
    if not transcoders:
        raise TranscoderError("A cross-layer transcoder needs at least one transcoder.")
    models = sorted(transcoders.values(), key=_layer)
    configs = [model.config for model in models]
    first = configs[0]
    for name, config in zip(transcoders, configs, strict=True):
        if type(config) is not TranscoderConfig:
            raise TranscoderError("These are the layers of a cross-layer transcoder already: use it as it is.")
        for field in TranscoderConfig.own_fields():
            if field not in _OWN and getattr(config, field) != getattr(first, field):
                raise TranscoderError(
                    f"'{name}' has another `{field}` than the others ({getattr(config, field)!r}, not "
                    f"{getattr(first, field)!r}): give transcoders that differ in their sites alone."
                )
        if config.input_site is None or config.output_site is None:
            raise TranscoderError(
                f"'{name}' does not say which sites it reads and writes: set them in its configuration."
            )
    fields = {name: getattr(first, name) for name in TranscoderConfig.own_fields() if name not in _OWN}
    variances = [config.target_variance for config in configs]
    config = cls.config_class(
        **fields,
        input_sites=[config.input_site for config in configs],
        output_sites=[config.output_site for config in configs],
        window=window,
        target_variances=None if None in variances else variances,
        training_summary=first.training_summary,
    )
    made = cls(config).to(models[0].device, models[0].dtype)
    for model, source in zip(models, made.layers, strict=True):
        state = model.state_dict()
        decoder, scale = state.pop("W_dec"), state.pop("output_scale", None)
        source.load_state_dict(state, strict=False)
        source.W_dec.zero_()
        source.W_dec[:, 0] = decoder
        if scale is not None:
            source.output_scale[0] = scale
    made.share_scales_()
    return made.train(models[0].training)


def _layer(model: TranscoderModel) -> tuple[int, str]:
    site = model.config.input_site or ""
    found = re.match(r"layers\.(\d+)\.", site)
    return int(found[1]) if found else -1, site
