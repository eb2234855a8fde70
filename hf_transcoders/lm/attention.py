"""Read and change queries, keys, values, attention patterns and outputs of single heads."""

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig, PreTrainedModel
from transformers.masking_utils import eager_mask

from ..errors import TranscoderError
from .architectures import locate, num_layers
from .sites import Site
from .threads import Scope, Shared, attaching, patched
from .wrappers import opens_on_model


NAME = "hf_transcoders"

# Editors by `id` of a config or an attention module, the outermost block first.
_editors: dict[int, tuple["_Editor", ...]] = {}


@dataclass
class AttentionCall:
    """One attention computation, as the model asks for it.

    Args:
        layer (`int`):
            Layer of the block.
        query (`torch.Tensor` of shape `(batch, heads, queries, head_dim)`):
            Queries, after the rotary embedding.
        key, value (`torch.Tensor` of shape `(batch, kv_heads, keys, head_dim)`):
            Keys, after the rotary embedding, and values, those of a cache included. With grouped queries several heads
            share one.
        mask (`torch.Tensor` of shape `(batch or 1, 1, queries, keys)`):
            0 where a query may attend and the lowest number elsewhere, including causality and sliding windows.
        module (`torch.nn.Module`):
            The attention module.
        options (`dict`):
            Other arguments of the model, such as `scaling`, `dropout` and `softcap`.
    """

    layer: int
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    mask: torch.Tensor | None
    module: nn.Module
    options: dict[str, Any]

    def run(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The model's own eager attention on this call.

        Returns:
            `tuple`: Outputs z of the heads, `(batch, queries, heads, head_dim)`, and the pattern
            `(batch, heads, queries, keys)`.
        """
        return _eager(self.module)(self.module, self.query, self.key, self.value, self.mask, **self.options)

    def mix(self, pattern: torch.Tensor) -> torch.Tensor:
        """Outputs z of the heads for an attention pattern, `(batch, queries, heads, head_dim)`."""
        groups = pattern.shape[1] // self.value.shape[1]
        return (pattern @ self.value.repeat_interleave(groups, dim=1)).transpose(1, 2)


def softmax_pattern(
    products: torch.Tensor, mask: torch.Tensor, scaling: float, options: dict[str, Any], sinks: torch.Tensor | None
) -> torch.Tensor:
    """Attention patterns as most families compute them: a softmax with scaling, and with soft-cap and sinks if there are any.

    Args:
        products (`torch.Tensor` of shape `(..., queries, keys)`): Products of queries and keys.
        mask (`torch.Tensor`): Mask that is added to the scores, in a shape that broadcasts.
        scaling (`float`): Factor on the products.
        options (`dict`): Those of the [`AttentionCall`].
        sinks (`torch.Tensor`, *optional*): Scores of nothing, in a shape that broadcasts to `(..., queries, 1)`.

    Returns:
        `torch.Tensor` of shape `(..., queries, keys)`, in the dtype of `products`.
    """
    scores = products * scaling
    softcap = options.get("softcap")
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    scores += mask
    if sinks is not None:
        scores = torch.cat([scores, sinks.to(scores).expand(*scores.shape[:-1], 1)], dim=-1)
    pattern = torch.softmax(scores, dim=-1, dtype=torch.float32).to(products.dtype)
    return pattern if sinks is None else pattern[..., :-1]


@dataclass(frozen=True)
class _Editor:
    scope: Scope
    # Attention modules in the order of layers.
    layers: dict[nn.Module, int]
    query: Callable | None = None
    key: Callable | None = None
    value: Callable | None = None
    pattern: Callable | None = None
    z: Callable | None = None
    compute: Callable | None = None


@opens_on_model
@contextmanager
def edit_attention(
    model: PreTrainedModel,
    *,
    query: Callable[[torch.Tensor, int], torch.Tensor | None] | None = None,
    key: Callable[[torch.Tensor, int], torch.Tensor | None] | None = None,
    value: Callable[[torch.Tensor, int], torch.Tensor | None] | None = None,
    pattern: Callable[[torch.Tensor, int], torch.Tensor | None] | None = None,
    z: Callable[[torch.Tensor, int], torch.Tensor | None] | None = None,
    compute: Callable[[AttentionCall], torch.Tensor] | None = None,
) -> Iterator[None]:
    """Read or change parts of attention in every forward pass of `model` inside the `with` block, `generate` included.

    Each function is called as `function(tensor, layer)` in every layer and returns the tensor to use instead, or `None`
    to leave it. Without functions the logits are those of eager attention, bit for bit. Blocks may be
    nested; the functions of the inner one see what those of the outer one have changed.

    A block acts on the thread that entered it and on threads that are started inside it; see [`capture`]. The model runs
    in the mode it is in, training or evaluation.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            A causal language model or its base model, plain or wrapped (see [`language_model`]).
        query (`Callable`, *optional*):
            Gets the queries, `(batch, heads, queries, head_dim)`, after the rotary embedding.
        key, value (`Callable`, *optional*):
            Get the keys (after the rotary embedding) and values, `(batch, kv_heads, keys, head_dim)`, those of a cache
            included. With grouped queries several heads share one.
        pattern (`Callable`, *optional*):
            Gets the attention patterns, `(batch, heads, queries, keys)`, with rows that sum to 1.
        z (`Callable`, *optional*):
            Gets the outputs of the heads, `(batch, heads, queries, head_dim)`, before the output projection.
        compute (`Callable`, *optional*):
            Computes z, `(batch, queries, heads, head_dim)`, from an [`AttentionCall`] in place of the model; patterns
            are then not computed.

    Raises:
        [`TranscoderError`]: the family is not known, the model's attention cannot be edited, or functions exclude each
            other.

    Example:

    ```python
    >>> # Freeze the patterns: gradients go through the values only.
    >>> with edit_attention(model, pattern=lambda pattern, layer: pattern.detach()):
    ...     model(input_ids).logits[0, -1, target].backward()

    >>> # Let head 3 of layer 8 attend to the first token.
    >>> def attend_to_first(pattern, layer):
    ...     if layer == 8:
    ...         pattern[:, 3] = 0
    ...         pattern[:, 3, :, 0] = 1
    ...         return pattern
    >>> with edit_attention(model, pattern=attend_to_first):
    ...     model.generate(input_ids)
    ```
    """
    if compute is not None and (pattern is not None or z is not None):
        raise TranscoderError(
            "`compute` returns the outputs of the heads, so `pattern` and `z` would not be called: leave them out, or change "
            "the pattern inside `compute`."
        )
    modules = attention_modules(model)
    configs = [model.config, model.config.get_text_config(), *(module.config for module in modules)]
    with ExitStack() as stack:
        _choosing.hold(stack)
        layers = {module: layer for layer, module in enumerate(modules)}
        editor = _Editor(Scope.of(stack), layers, query, key, value, pattern, z, compute)
        for edited in {id(edited): edited for edited in (*configs, *modules)}.values():
            _add_editor(stack, edited, editor)
        yield


def _add_editor(stack, edited, editor):
    """Register `editor` for a config or module until `stack` closes; stacks may close in any order."""

    # Holds `edited`, whose number nothing else gets meanwhile.
    def remove():
        with attaching:
            left = tuple(other for other in _editors.pop(id(edited)) if other is not editor)
            if left:
                _editors[id(edited)] = left

    with attaching:
        _editors[id(edited)] = (*_editors.get(id(edited), ()), editor)
    stack.callback(remove)


def _acting_at(edited) -> list[_Editor]:
    """Editors of a config or module that act on the current forward pass."""
    editors = _editors.get(id(edited), ())
    acting = [editor for editor in editors if editor.scope.acts()]
    if editors and not acting:
        editors[-1].scope.warn_if_left_out()
    return acting


@contextmanager
def _choosing_by_thread():
    """A config names our attention to the threads that edit it, and the one it is set to to all others."""
    original = PreTrainedConfig.__dict__["_attn_implementation"]

    def chosen(config):
        return NAME if id(config) in _editors and _acting_at(config) else original.fget(config)

    with patched(PreTrainedConfig, "_attn_implementation", original.getter(chosen)):
        yield


_choosing = Shared(_choosing_by_thread)


def attention_modules(model: PreTrainedModel, layers: Iterable[int] | None = None) -> list[nn.Module]:
    """The attention module of each layer.

    Args:
        model ([`~transformers.PreTrainedModel`]): A language model.
        layers (`Iterable[int]`, *optional*): Layers to return the modules of. Defaults to all.

    Raises:
        [`TranscoderError`]: the family is not known, or the model's attention cannot be edited.
    """
    layers = range(num_layers(model)) if layers is None else layers
    modules = [locate(model, Site("attn.in", layer)).module for layer in layers]
    kinds = {type(module) for module in modules}
    editable = all(_eager(module) is not None for module in modules) and model._can_set_attn_implementation()
    if not editable or getattr(model.config, "reorder_and_upcast_attn", False):
        raise TranscoderError(
            f"The attention of this {model.config.model_type} model ({', '.join(kind.__name__ for kind in kinds)}) does "
            "not go through transformers' AttentionInterface, so heads cannot be read or changed; load a model of a "
            "family whose attention does."
        )
    return modules


def num_heads(model: PreTrainedModel) -> tuple[int, int]:
    """Number of query heads and of key-value heads of a layer."""
    config = model.config.get_text_config()
    return config.num_attention_heads, getattr(config, "num_key_value_heads", None) or config.num_attention_heads


def _eager(module):
    return getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)


def _attention(module, query, key, value, attention_mask, **options):
    editors = _acting_at(module)
    if not editors:
        # Of another model that shares the config.
        return _eager(module)(module, query, key, value, attention_mask, **options)
    layer = editors[0].layers[module]
    call = AttentionCall(layer, query, key, value, attention_mask, module, options)
    for part in ("query", "key", "value"):
        setattr(call, part, _apply(editors, layer, part, getattr(call, part))[0])
    computing = [editor for editor in editors if editor.compute is not None]
    if computing:
        if len(computing) > 1 or any(editor.pattern is not None or editor.z is not None for editor in editors):
            raise TranscoderError(
                "Attention is replaced by another computation here (as in patching), which leaves out the patterns and "
                "outputs that another `edit_attention` around it changes: do one after the other."
            )
        return computing[0].compute(call), None
    z, pattern = call.run()
    pattern, changed = _apply(editors, layer, "pattern", pattern)
    if changed:
        z = call.mix(pattern)
    z, _ = _apply(editors, layer, "z", z.transpose(1, 2))
    return z.transpose(1, 2), pattern


def _apply(editors, layer, part, tensor):
    """The tensor after all functions for this part, and whether any of them returned a new one."""
    changed = False
    for editor in editors:
        function = getattr(editor, part)
        new = None if function is None else function(tensor, layer)
        if new is not None:
            tensor, changed = new, True
    return tensor, changed


AttentionInterface.register(NAME, _attention)
# For a name it does not know, transformers builds no mask at all, and attention is no longer causal.
AttentionMaskInterface.register(NAME, eager_mask)
