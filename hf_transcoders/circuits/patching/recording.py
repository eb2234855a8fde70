"""A run of some prompts, kept for patching: what single blocks need to be run again, and what can be patched in."""

import inspect
from contextlib import ExitStack
from dataclasses import dataclass, field

import torch
from transformers import PreTrainedModel

from ...lm.architectures import locate, num_layers
from ...lm.attention import edit_attention
from ...lm.hooks import before_call, read_at
from ...lm.sites import Site


@dataclass(frozen=True)
class Window:
    """The tokens of each prompt that a run is about: `size` of them from `start` on.

    Args:
        start (`torch.LongTensor` of shape `(prompts,)`): First token of each prompt.
        size (`int`): How many tokens.
    """

    start: torch.Tensor
    size: int

    @property
    def index(self) -> torch.Tensor:
        """Token indices, `(prompts, size)`."""
        return self.start[:, None] + torch.arange(self.size, device=self.start.device)

    def take(self, tensor: torch.Tensor, offset: torch.Tensor | int = 0) -> torch.Tensor:
        """These tokens of `tensor`, `(prompts, ..., seq, width)`, which begins `offset` tokens into each prompt."""
        index = self.index - (offset[:, None] if isinstance(offset, torch.Tensor) else offset)
        prompts, seq = tensor.shape[0], tensor.shape[-2]
        if self.size == seq:
            return tensor
        index = index.reshape(prompts, *[1] * (tensor.dim() - 3), self.size, 1)
        return tensor.gather(-2, index.expand(*tensor.shape[:-2], self.size, tensor.shape[-1]))

    @classmethod
    def until(cls, last: torch.Tensor, first: torch.Tensor) -> "Window":
        """The shortest windows of one size that hold the tokens `first` to `last` of each prompt."""
        size = int((last - first).max()) + 1
        return cls((last - size + 1).clamp(min=0), size)


@dataclass
class Recording:
    """Activations of a run in every layer. Those marked * are of the tokens of `window` only.

    Args:
        window ([`Window`]): The tokens.
        final (`torch.Tensor` of shape `(prompts, hidden)`): Residual stream behind the last block, at the last token.
        parts (`dict[str, list[torch.Tensor]]`):
            Name -> activations of each layer: `resid_pre`*, `resid_mid`*, `attn.out`*, `mlp.out`*, `(prompts, window, hidden)`;
            `query`*, `z`*, `(prompts, heads, window, head_dim)`; `pattern`*, `(prompts, heads, window, seq)`; `key`,
            `value`, `(prompts, kv_heads, seq, head_dim)`. `resid_pre` has one more entry, the stream that leaves the
            last block.
        calls (`list[dict]`): Arguments of each block.
        masks (`list[torch.Tensor]`): Attention mask of each layer, `(seq, seq)`.
        options (`list[dict]`): What the model passes to attention in each layer.
    """

    window: Window
    final: torch.Tensor | None = None
    parts: dict[str, list] = field(default_factory=dict)
    calls: list = field(default_factory=list)
    masks: list = field(default_factory=list)
    options: list = field(default_factory=list)


def record(
    model: PreTrainedModel, input_ids: torch.Tensor, last: torch.Tensor, window: Window, parts: set[str]
) -> Recording:
    """Run prompts and keep activations.

    Args:
        model ([`~transformers.PreTrainedModel`]): A causal language model.
        input_ids (`torch.LongTensor` of shape `(prompts, seq)`): Prompts, padded on the right.
        last (`torch.LongTensor` of shape `(prompts,)`): Index of the last token of each.
        window ([`Window`]): The tokens to keep.
        parts (`set[str]`): Which activations to keep.

    Returns:
        [`Recording`]
    """
    recording = Recording(window, parts={part: [] for part in parts})
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
        keep("query", call.query)
        keep("key", call.key, whole=True)
        keep("value", call.value, whole=True)
        keep("pattern", pattern)
        keep("z", z.transpose(1, 2))
        return z

    def leave(hidden):
        keep("resid_pre", hidden)
        recording.final = hidden[prompts, last]

    with ExitStack() as stack:
        stack.enter_context(edit_attention(model, compute=compute))
        for layer in range(num_layers(model)):
            block = locate(model, Site("resid_pre", layer)).module
            before_call(stack, block, enter)
            for point in ("attn.out", "resid_mid", "mlp.out"):
                if point in parts:
                    location = locate(model, Site(point, layer))
                    read_at(stack, location, lambda value, point=point: keep(point, value))
        read_at(stack, locate(model, Site("resid_post", num_layers(model) - 1)), leave)
        # Padding is on the right, where no token of a prompt looks: it needs no mask of its own.
        model.get_decoder()(input_ids=input_ids, attention_mask=torch.ones_like(input_ids), use_cache=False)
    return recording
