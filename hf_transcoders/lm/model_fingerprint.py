"""A fingerprint of everything that determines the outputs of a language model."""

import json
from collections.abc import Collection, Iterator
from typing import Any

import torch
from accelerate.utils import align_module_device
from torch import nn
from transformers import PreTrainedModel

from ..errors import TranscoderError
from ..fingerprint import digest_of, tensor_digest
from .wrappers import language_model


# Fields of a configuration that say what a model is called, how it is saved, started or used, but not what it computes.
_NOT_NUMBERS = {
    "_commit_hash", "_name_or_path", "architectures", "auto_map", "bos_token_id", "cls_token_id", "decoder_start_token_id",
    "dtype", "eos_token_id", "finetuning_task", "id2label", "initializer_range", "label2id", "mask_token_id", "name_or_path",
    "output_attentions", "output_hidden_states", "pad_token_id", "prefix", "problem_type", "return_dict", "sep_token_id",
    "task_specific_params", "tokenizer_class", "torch_dtype", "torchscript", "transformers_version", "use_cache",
    "weights_origin",
}  # fmt: skip
# Attributes of modules that change while a model is used, moved or switched between training and evaluation, or that only
# gradients depend on.
_STATES = {"compute_type_is_set", "gradient_checkpointing", "is_quantized", "padding_idx", "training"}
# Private attributes by which PEFT decides which adapters take part.
_ADAPTER_SWITCHES = {"_active_adapter", "_disable_adapters"}
# Buffers that are computed and not saved may differ in their last bits between processors.
_COMPARED_IN_FULL = 4096


def model_facts(base_model: nn.Module) -> dict[str, Any]:
    """
    Record everything that determines a language model's activations: all weights and buffers, its configuration, its adapters and
    the settings of its modules. The same model loaded again gives the same record, on any device and in any mode.

    Hooks that a caller has put on the model are code, which no record can hold: they are not in it.

    Args:
        base_model ([`~transformers.PreTrainedModel`]): The model, also wrapped or with adapters.

    Returns:
        `dict[str, Any]`: JSON data for [`~hf_transcoders.fingerprint.differences`].
    """
    model = language_model(base_model)
    weights, modules, active = {}, {}, set()
    for path, module, idle in _taking_part(model):
        modules[path] = [type(module).__qualname__, _settings(module)]
        active |= set(_active_adapters(module))
        for name, digest in _tensor_digests(module):
            if name not in idle:
                weights[f"{path}.{name}"] = digest
    return {
        "model_type": model.config.model_type,
        "config": _configuration(model),
        "adapters": sorted(active),
        "weights": digest_of(weights),
        "modules": digest_of(modules),
    }


def _configuration(model: PreTrainedModel) -> dict[str, Any]:
    fields = _without_names(json.loads(json.dumps(model.config.to_dict(), default=str)))
    for name in ("_attn_implementation", "_experts_implementation"):
        fields[name.removeprefix("_")] = getattr(model.config, name, None)
    return fields


def _without_names(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_names(part) for key, part in value.items() if key not in _NOT_NUMBERS}
    return value


# ---------------------------------------------------------------------------------------------------- modules


def _settings(module: nn.Module) -> dict[str, Any]:
    """Numbers, flags and names among a module's attributes, such as the epsilon of a norm or the scale of LoRA."""
    if isinstance(module, PreTrainedModel):
        return {}  # They are in its configuration.
    settings = {
        name: value
        for name, value in vars(module).items()
        if (not name.startswith("_") or name in _ADAPTER_SWITCHES)
        and name not in _STATES
        and not name.endswith("max_seq_len_cached")
        and "device" not in name
        and _is_plain(value)
    }
    known, taking_part = _adapter_names(module), _active_adapters(module) + _merged_adapters(module)
    return {
        name: {key: value[key] for key in value if key in taking_part}
        if known and isinstance(value, dict) and value.keys() <= known
        else value
        for name, value in settings.items()
    }


def _is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(isinstance(key, str | int) and _is_plain(part) for key, part in value.items())
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, bool | int | float | str)


# ---------------------------------------------------------------------------------------------------- adapters


def _taking_part(
    module: nn.Module, path: str = "", idle: Collection[str] = ()
) -> Iterator[tuple[str, nn.Module, Any]]:
    """Path, module and tensors to leave out, for every module except those of inactive adapters."""
    names = _adapter_names(module)
    active = _active_adapters(module)
    wrapped = getattr(module, "base_layer", None) or getattr(module, "original_module", None)
    if names and not active and not _merged_adapters(module) and isinstance(wrapped, nn.Module):
        # It acts as the layer that it replaces.
        yield from _taking_part(wrapped, path)
        return
    yield path, module, idle
    containers = _adapter_containers(module)
    for name, child in module.named_children():
        if name not in idle:
            unused = names - set(active) if name in containers else ()
            yield from _taking_part(child, f"{path}.{name}", unused)


def _active_adapters(module: nn.Module) -> list[str]:
    if getattr(module, "_disable_adapters", False):
        return []
    active = getattr(module, "_active_adapter", None) or []
    return [active] if isinstance(active, str) else list(active)


def _merged_adapters(module: nn.Module) -> list[str]:
    return list(getattr(module, "merged_adapters", ()))


def _adapter_containers(module: nn.Module) -> dict[str, nn.Module]:
    """Adapters by name, for each attribute of a module that PEFT put in place of another."""
    if not hasattr(module, "_active_adapter"):
        return {}
    return {
        name: child
        for name, child in module.named_children()
        if isinstance(child, nn.ModuleDict | nn.ParameterDict) or type(child).__name__ == "BufferDict"
    }


def _adapter_names(module: nn.Module) -> set[str]:
    return {adapter for container in _adapter_containers(module).values() for adapter in container.keys()}  # pyright: ignore[reportCallIssue]


# ---------------------------------------------------------------------------------------------------- tensors


def _tensor_digests(module: nn.Module) -> Iterator[tuple[str, str]]:
    """Tensors of a module without its children, as it saves them (with the scales of quantized ones), and its buffers."""
    direct = [*module._parameters.values(), *module._buffers.values()]
    if hasattr(module, "_hf_hook") and any(tensor is not None and tensor.is_meta for tensor in direct):
        # Offloaded: the weights come into memory for as long as they are read.
        with align_module_device(module, "cpu"):
            yield from _loaded_tensor_digests(module)
    else:
        yield from _loaded_tensor_digests(module)


def _loaded_tensor_digests(module: nn.Module) -> Iterator[tuple[str, str]]:
    saved: dict[str, Any] = {}
    module._save_to_state_dict(saved, "", keep_vars=False)
    for name, value in saved.items():
        if not isinstance(value, torch.Tensor):
            yield name, digest_of(str(value))
            continue
        if value.is_meta:
            raise TranscoderError(
                f"The weights of a {type(module).__name__} of the base model are not loaded (they are on the meta "
                "device): load it with `from_pretrained`."
            )
        yield name, tensor_digest(value)
    for name in module._non_persistent_buffers_set:
        value = module._buffers.get(name)
        if value is not None and not (_follows_input(module) and "inv_freq" in name and "original" not in name):
            yield name, _computed_digest(value)


def _follows_input(module: nn.Module) -> bool:
    """Whether a rotary embedding's frequencies depend on the length of the input."""
    types = getattr(module, "rope_type", None) or ""
    types = types.values() if isinstance(types, dict) else [types]
    return any("dynamic" in kind or "longrope" in kind for kind in types)


def _computed_digest(value: torch.Tensor) -> str:
    if not value.is_floating_point():
        return tensor_digest(value)
    if value.numel() <= _COMPARED_IN_FULL:
        return digest_of([str(value.dtype), tensor_digest(value.to(torch.bfloat16))])
    flat = value.detach().double().flatten()
    place = torch.linspace(0, 1, flat.numel(), dtype=torch.float64, device=flat.device)
    moments = [flat.sum(), flat.square().sum(), (place * flat).sum(), (place * flat.square()).sum()]
    return digest_of(
        [str(value.dtype), list(value.shape), [f"{moment:.4g}" for moment in torch.stack(moments).tolist()]]
    )
