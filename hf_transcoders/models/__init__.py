"""Sparse dictionaries: configuration, model, sets of several dictionaries, and cross-layer transcoders."""

from transformers import AutoConfig, AutoModel

from .configuration_transcoder import TranscoderConfig
from .cross_layer.configuration_cross_layer import CrossLayerTranscoderConfig
from .cross_layer.modeling_cross_layer import CrossLayerTranscoder
from .modeling_transcoder import TranscoderModel, TranscoderOutput
from .transcoder_set import TranscoderSet, TranscoderSetOutput


__all__ = [
    "CrossLayerTranscoder",
    "CrossLayerTranscoderConfig",
    "TranscoderConfig",
    "TranscoderModel",
    "TranscoderOutput",
    "TranscoderSet",
    "TranscoderSetOutput",
]


AutoConfig.register("transcoder", TranscoderConfig, exist_ok=True)
AutoModel.register(TranscoderConfig, TranscoderModel, exist_ok=True)
AutoConfig.register("cross_layer_transcoder", CrossLayerTranscoderConfig, exist_ok=True)
AutoModel.register(CrossLayerTranscoderConfig, CrossLayerTranscoder, exist_ok=True)
