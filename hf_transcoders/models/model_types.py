"""The classes of saved models, by the model type in their configuration."""

import math
from typing import Any

from .configuration_transcoder import TranscoderConfig
from .cross_layer.configuration_cross_layer import CrossLayerSourceConfig, CrossLayerTranscoderConfig
from .cross_layer.modeling_cross_layer import CrossLayerTranscoder
from .cross_layer.source import source_parameter_shapes
from .modeling_transcoder import TranscoderModel, parameter_shapes
from .saved_files import SavedDictionary, expect


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


def saved_config(
    saved: SavedDictionary, model_type: type[TranscoderModel] | type[CrossLayerTranscoder] | None = None
) -> TranscoderConfig:
    """
    The configuration of a saved model, after the headers of its weights were compared with it. No weights are read.

    Args:
        saved ([`SavedDictionary`]): Opened files.
        model_type (`type`, *optional*): Class that is expected. By default the one that the configuration names.

    Raises:
        [`TranscoderError`]: the configuration is that of another class, or the weights do not match it.
    """
    model_type = model_type or model_type_of(saved.fields)
    config = model_type.config_class.from_dict(saved.fields)
    expect(saved, model_type.tensor_shapes(config))
    return config


def count_parameters(config: TranscoderConfig) -> int:
    """Number of parameters of a dictionary, or of all layers of a cross-layer transcoder."""
    if (layers := dictionary_configs(config)) is not None:
        return sum(map(count_parameters, layers.values()))
    shapes = source_parameter_shapes if isinstance(config, CrossLayerSourceConfig) else parameter_shapes
    return sum(math.prod(shape) for shape in shapes(config).values() if shape is not None)  # pyright: ignore[reportArgumentType]
