"""Devices of a model and of its inputs."""

import torch
from torch import nn
from transformers import PreTrainedModel

from ..errors import TranscoderError


def input_device(model: PreTrainedModel) -> torch.device:
    """Device of a model's inputs: that of its input embeddings.

    `model.device` is that of the first parameter, which in an offloaded model is "meta" and in a split one any of several.
    """
    return module_device(model.get_input_embeddings())


def module_device(module: nn.Module) -> torch.device:
    """Device that a module computes on: that of its weights, or the one that accelerate loads them to."""
    for part in module.modules():
        device = _execution_device(getattr(part, "_hf_hook", None))
        if device is not None:
            return device
    return next((parameter.device for parameter in module.parameters()), torch.device("cpu"))


def moved(model: PreTrainedModel, device: torch.device | str) -> PreTrainedModel:
    """A model on a device; one that is offloaded, split over devices or quantized stays where it is."""
    hooked = any(_execution_device(getattr(part, "_hf_hook", None)) is not None for part in model.modules())
    return model if hooked or getattr(model, "is_quantized", False) else model.to(device)


def check_one_device(model: PreTrainedModel) -> None:
    """Refuses a model whose layers compute on several devices, for functions that combine their outputs.

    Raises:
        [`TranscoderError`]: they do. Layers that are only kept elsewhere, offloaded, do not.
    """
    if len(set(getattr(model, "hf_device_map", {}).values())) < 2:
        return
    parts = [part for part in model.modules() if next(part.parameters(recurse=False), None) is not None]
    devices = sorted({str(device) for part in parts if (device := module_device(part)).type != "meta"})
    if len(devices) > 1:
        raise TranscoderError(
            f"The model is split over {', '.join(devices)}, and circuits put the parts of all its layers together: load it "
            "on one device, or with a `device_map` that offloads what does not fit."
        )


def _execution_device(hook) -> torch.device | None:
    if hook is None:
        return None
    # Several hooks of one module are held by one.
    for each in getattr(hook, "hooks", (hook,)):
        device = getattr(each, "execution_device", None)
        if device is not None:
            return torch.device(device)
    return None
