"""Registration of the model type "transcoder" with AutoConfig and AutoModel."""

import importlib

import wrapt


# Module of an Auto class -> module of ours whose class it must know, and the function that registers this class.
_MODULES = {
    "transformers.models.auto.configuration_auto": (f"{__package__}.configuration_transcoder", "_register_config"),
    "transformers.models.auto.modeling_auto": (f"{__package__}.modeling_transcoder", "_register_model"),
}


def register_with_auto_classes() -> None:
    """Register [`TranscoderConfig`] and [`TranscoderModel`] with the Auto classes as soon as both are imported.

    Neither is imported here. Importing an Auto class imports the class to register, and importing that class registers it,
    so the order of the imports does not matter, nor does an import of one in the middle of an import of the other.
    """
    for auto, (ours, register) in _MODULES.items():
        wrapt.register_post_import_hook(lambda _, ours=ours: importlib.import_module(ours), auto)
        wrapt.register_post_import_hook(f"{__name__}:{register}", ours)


def _register_config(module):
    from transformers import AutoConfig

    AutoConfig.register("transcoder", module.TranscoderConfig, exist_ok=True)


def _register_model(module):
    from transformers import AutoModel

    AutoModel.register(module.TranscoderConfig, module.TranscoderModel, exist_ok=True)
