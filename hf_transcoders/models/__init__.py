"""Sparse dictionaries: configuration, model, and sets of several dictionaries."""

from transformers import AutoConfig, AutoModel

from .configuration_transcoder import TranscoderConfig
from .modeling_transcoder import TranscoderModel, TranscoderOutput
from .transcoder_set import TranscoderSet, TranscoderSetOutput


__all__ = [
    "TranscoderConfig",
    "TranscoderModel",
    "TranscoderOutput",
    "TranscoderSet",
    "TranscoderSetOutput",
]


AutoConfig.register("transcoder", TranscoderConfig, exist_ok=True)
AutoModel.register(TranscoderConfig, TranscoderModel, exist_ok=True)
