"""Record the run of some prompts: activations to patch, and the inputs that single blocks need to run again."""

import functools
import inspect
from contextlib import ExitStack
from dataclasses import dataclass, field

import torch
from transformers import PreTrainedModel

from ...errors import TranscoderError
from ...lm.architectures import decoder_blocks, locate
from ...lm.attention import edit_attention, softmax_pattern
from ...lm.freeze import keep_others
from ...lm.heads import output_projection
from ...lm.hooks import before_call, read_at
from ...lm.sites import Site


# Number of queries on which the attention of the model is compared with that of patched blocks.
_CHECKED_QUERIES = 8


@dataclass(frozen=True)
class Window:
    """The recorded or patched tokens of each prompt: `size` tokens from `start` on.

    Args:
        start (`torch.LongTensor` of shape `(prompts,)`): First token of each prompt.
        size (`int`): Number of tokens.
    """

    start: torch.Tensor
    size: int

    @property
    def index(self) -> torch.Tensor:
        """Token indices, `(prompts, size)`."""
        return self.start[:, None] + torch.arange(self.size, device=self.start.device)

    def take(self, tensor: torch.Tensor, offset: torch.Tensor | int = 0) -> torch.Tensor:
        """Select these tokens of `tensor`, `(prompts, ..., seq, width)`, which starts `offset` tokens into each prompt."""
        index = self.index - (offset[:, None] if isinstance(offset, torch.Tensor) else offset)
        prompts, seq = tensor.shape[0], tensor.shape[-2]
        if self.size == seq:
            return tensor
        index = index.reshape(prompts, *[1] * (tensor.dim() - 3), self.size, 1)
        return tensor.gather(-2, index.expand(*tensor.shape[:-2], self.size, tensor.shape[-1]))

    @classmethod
    def until(cls, last: torch.Tensor, first: torch.Tensor) -> "Window":
        """Make the smallest windows of one size that contain the tokens `first` to `last` of each prompt."""
        size = int((last - first).max()) + 1
        return cls((last - size + 1).clamp(min=0), size)


@dataclass
class Recording:
    """Activations of a run in every layer. Those marked * are only of the tokens in `window`.

    Args:
        window ([`Window`]): The tokens.
        final (`torch.Tensor` of shape `(prompts, hidden)`): Residual stream after the last block, at the last token.
        parts (`dict[str, list[torch.Tensor]]`):
            Name -> activations of each layer: `resid_pre`*, `resid_mid`*, `attn.out`*, `mlp.out`*, `(prompts, window, hidden)`;
            `query`*, `z`*, `(prompts, heads, window, head_dim)`; `pattern`*, `(prompts, heads, window, seq)`; `key`,
            `value`, `(prompts, kv_heads, seq, head_dim)`. `resid_pre` has one more entry, the output of the last
            block.
        calls (`list[dict]`): Arguments of each block.
        masks (`list[torch.Tensor]`): Attention mask of each layer, `(seq, seq)`.
        options (`list[dict]`): Options of attention in each layer.
        mlp_others (`list[tuple]`): Further outputs of the module of `mlp.out` in each layer.
    """

    window: Window
    final: torch.Tensor | None = None
    parts: dict[str, list] = field(default_factory=dict)
    calls: list = field(default_factory=list)
    masks: list = field(default_factory=list)
    options: list = field(default_factory=list)
    mlp_others: list = field(default_factory=list)


def record(
    model: PreTrainedModel, input_ids: torch.Tensor, last: torch.Tensor, window: Window, parts: set[str]
) -> Recording:
    """Run prompts and record activations.

    Args:
        model ([`~transformers.PreTrainedModel`]): A causal language model.
        input_ids (`torch.LongTensor` of shape `(prompts, seq)`): Prompts, padded on the right.
        last (`torch.LongTensor` of shape `(prompts,)`): Index of the last token of each.
        window ([`Window`]): The tokens to record.
        parts (`set[str]`): Names of the activations to record.

    Returns:
        [`Recording`]
    """
    blocks = decoder_blocks(model)
    layers = range(len(blocks))
    recording = Recording(window, parts={part: [] for part in parts}, mlp_others=[()] * len(layers))
    prompts = torch.arange(len(input_ids), device=input_ids.device)

    def keep(part, tensor, whole=False):
        if part in parts:
            kept = tensor if whole else window.take(tensor)
            recording.parts[part].append(kept.contiguous())

    def enter(block, args, kwargs):
        bound = inspect.signature(block.forward).bind(*args, **kwargs)
        arguments = dict(bound.arguments)
        arguments.update(arguments.pop("kwargs", {}))
        recording.calls.append(arguments)
        keep("resid_pre", next(iter(arguments.values())))

    def compute(call):
        recording.masks.append(call.mask[0, 0])
        recording.options.append(call.options)
        z, pattern = call.run()
        _check_attention(model, call, z)
        computed[call.layer] = z
        keep("query", call.query)
        keep("key", call.key, whole=True)
        keep("value", call.value, whole=True)
        keep("pattern", pattern)
        keep("z", z.transpose(1, 2))
        return z

    def project(module, args, kwargs, layer):
        # Patched blocks pass changes of z through the projection only.
        given, z = args[0][:1], computed.pop(layer)[:1].flatten(2)
        if given.shape != z.shape or not torch.equal(given, z):
            raise TranscoderError(
                f"Layer {layer} of this {model.config.model_type} model changes the outputs of its heads before their "
                "projection, so its blocks cannot be patched alone: use `edit_attention` on whole forward passes."
            )

    def leave(hidden):
        keep("resid_pre", hidden)
        recording.final = hidden[prompts, last]

    computed = {}
    with ExitStack() as stack:
        stack.enter_context(edit_attention(model, compute=compute))
        for layer in layers:
            keep_others(stack, model, layer, recording.mlp_others)
            projection = output_projection(model, layer)
            before_call(stack, projection, functools.partial(project, layer=layer))
            before_call(stack, blocks[layer], enter)
            for point in ("attn.out", "resid_mid", "mlp.out"):
                if point in parts:
                    location = locate(model, Site(point, layer))
                    read_at(stack, location, lambda value, point=point: keep(point, value))
        read_at(stack, locate(model, Site("resid_post", layers[-1])), leave)
        # Padding is on the right, where no token of a prompt attends, so it needs no mask.
        model.get_decoder()(input_ids=input_ids, attention_mask=torch.ones_like(input_ids), use_cache=False)
    return recording


def scaling_of(options: dict, query: torch.Tensor) -> float:
    """The factor of products of queries `(..., head_dim)` and keys, given the options of attention."""
    scaling = options.get("scaling")
    return query.shape[-1] ** -0.5 if scaling is None else scaling


def _check_attention(model, call, z):
    """Compare the attention of the model with that of patched blocks on the end of one prompt; refuse a difference."""
    query, key, value = call.query[:1, :, -_CHECKED_QUERIES:], call.key[:1], call.value[:1]
    groups = query.shape[1] // key.shape[1]
    products = query @ key.repeat_interleave(groups, dim=1).transpose(-1, -2)
    sinks = call.options.get("s_aux")
    sinks = None if sinks is None else sinks.view(-1, 1, 1)
    mask = call.mask[:1, :, -_CHECKED_QUERIES:]
    pattern = softmax_pattern(products, mask, scaling_of(call.options, query), call.options, sinks)
    ours = (pattern @ value.repeat_interleave(groups, dim=1)).float()
    true = z[:1, -_CHECKED_QUERIES:].transpose(1, 2).float()
    tolerance = 1e-3 if z.dtype in (torch.float32, torch.float64) else 5e-2
    if not (ours - true).norm() <= tolerance * true.norm():
        raise TranscoderError(
            f"The attention of layer {call.layer} of this {model.config.model_type} model is not a softmax over products "
            "of queries and keys alone, so its blocks cannot be patched alone: use `edit_attention` on whole forward passes."
        )
