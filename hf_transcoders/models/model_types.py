"""The classes of saved models, by the model type in their configuration."""

from typing import Any

from .configuration_transcoder import TranscoderConfig
from .cross_layer.configuration_cross_layer import CrossLayerTranscoderConfig
from .cross_layer.modeling_cross_layer import CrossLayerTranscoder
from .modeling_transcoder import TranscoderModel


def model_type_of(fields: dict[str, Any]) -> type[TranscoderModel] | type[CrossLayerTranscoder]:
    """The class of a saved model.

    Args:
        fields (`dict[str, Any]`): Content of its `config.json`.
    """
    if fields.get("model_type") == CrossLayerTranscoderConfig.model_type:
        return CrossLayerTranscoder
    return TranscoderModel


def dictionary_configs(config: TranscoderConfig) -> dict[str, TranscoderConfig] | None:
    """The configurations of the layers of a cross-layer transcoder by name; `None` for the configuration of one dictionary."""
    if not isinstance(config, CrossLayerTranscoderConfig):
        return None
    return {name: config.source(number) for number, name in enumerate(config.names)}
