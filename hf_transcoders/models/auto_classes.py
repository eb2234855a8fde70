"""Registration of the model types of this package with AutoConfig and AutoModel."""

import importlib

import wrapt


_CONFIGS, _MODELS = "transformers.models.auto.configuration_auto", "transformers.models.auto.modeling_auto"
# Modules of Auto classes, modules of ours whose classes they must know, and the functions that register these classes.
_MODULES = (
    (_CONFIGS, "configuration_transcoder", "_register_config"),
    (_MODELS, "modeling_transcoder", "_register_model"),
    (_CONFIGS, "cross_layer.configuration_cross_layer", "_register_cross_layer_config"),
    (_MODELS, "cross_layer.modeling_cross_layer", "_register_cross_layer_model"),
)


def register_with_auto_classes() -> None:
    """Register configurations and models of this package with the Auto classes as soon as both are imported.

    Neither is imported here. Importing an Auto class imports the class to register, and importing that class registers it,
    so the order of the imports does not matter, nor does an import of one in the middle of an import of the other.
    """
    for auto, module, register in _MODULES:
        ours = f"{__package__}.{module}"
        wrapt.register_post_import_hook(lambda _, ours=ours: importlib.import_module(ours), auto)
        wrapt.register_post_import_hook(f"{__name__}:{register}", ours)


def _register_config(module):
    from transformers import AutoConfig

    AutoConfig.register("transcoder", module.TranscoderConfig, exist_ok=True)


def _register_model(module):
    from transformers import AutoModel

    AutoModel.register(module.TranscoderConfig, module.TranscoderModel, exist_ok=True)


def _register_cross_layer_config(module):
    from transformers import AutoConfig

    AutoConfig.register("cross_layer_transcoder", module.CrossLayerTranscoderConfig, exist_ok=True)


def _register_cross_layer_model(module):
    from transformers import AutoModel

    AutoModel.register(module.CrossLayerTranscoderConfig, module.CrossLayerTranscoder, exist_ok=True)
