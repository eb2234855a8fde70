"""Freeze norm scales, attention patterns and MLP outputs of a language model at one run."""

import functools
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel

from ..errors import TranscoderError
from .architectures import architecture_of, decoder_blocks, final_norm, locate, num_layers
from .attention import edit_attention
from .capture import capture
from .devices import input_device
from .forwards import ForwardTokens, before_forward
from .heads import check_projected
from .hooks import after_call, before_call, wrap_forward
from .inputs import check_tokens, forget_lengths_
from .norms import frozen_norm, norm_bias
from .sites import Site, parse_sites
from .wrappers import measures_model, opens_on_model


@dataclass(frozen=True)
class FrozenRun:
    """Recorded values of one run, from [`record_frozen`]; all tensors are detached.

    Args:
        input_ids (`torch.LongTensor` of shape `(batch, seq)`):
            The prompts.
        norms (`dict[torch.nn.Module, Callable]`):
            Linear map ([`frozen_norm`]) of each norm at the scales of this run.
        patterns (`list[torch.Tensor]`):
            Attention patterns of each layer, `(batch, heads, seq, seq)`.
        mlp_outputs (`list[torch.Tensor]`):
            `mlp.out` of each layer, `(batch, seq, hidden)`.
        mlp_others (`list[tuple]`):
            Other outputs of the module of each layer's `mlp.out`: none, except for the routers of some families.
        activations (`dict[Site, torch.Tensor]`):
            Activations at the requested sites, `(batch, seq, width)`.
    """

    input_ids: torch.Tensor
    norms: dict[nn.Module, Callable[[torch.Tensor], torch.Tensor]]
    patterns: list[torch.Tensor]
    mlp_outputs: list[torch.Tensor]
    mlp_others: list[tuple]
    activations: dict[Site, torch.Tensor]


@measures_model
@torch.no_grad()
def record_frozen(model: PreTrainedModel, input_ids: torch.Tensor, sites: Iterable[str | Site] = ()) -> FrozenRun:
    """Run a model once and record the values that [`frozen`] needs.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            A causal language model or its base model, which runs in evaluation mode.
        input_ids (`torch.LongTensor` of shape `(batch, seq)`):
            The prompts, of one length and without padding.
        sites (an iterable of `str` or [`Site`], *optional*):
            Sites whose activations are recorded too.

    Returns:
        [`FrozenRun`]

    Raises:
        [`TranscoderError`]: the family is not known, its attention cannot be edited or its heads are not linear once
            their patterns are frozen, or a site does not exist.
    """
    check_tokens(model, list(input_ids))
    check_projected(model, "value")
    layers = range(num_layers(model))
    outputs = [Site("mlp.out", layer) for layer in layers]
    extra = parse_sites(sites) if (sites := list(sites)) else []
    norm_inputs, patterns, others = {}, [None] * len(layers), [()] * len(layers)

    def keep_pattern(pattern, layer):
        patterns[layer] = pattern

    def keep_input(norm, args, kwargs):
        norm_inputs[norm] = args[0].reshape(*input_ids.shape, -1)

    with ExitStack() as stack:
        stack.enter_context(edit_attention(model, pattern=keep_pattern))
        activations = stack.enter_context(capture(model, [*outputs, *extra], stop=False))
        for layer in layers:
            keep_others(stack, model, layer, others)
        for norm in _norms(model):
            before_call(stack, norm, keep_input)
        forget_lengths_(model)
        model.get_decoder()(input_ids=input_ids.to(input_device(model)), use_cache=False)
    return FrozenRun(
        input_ids=input_ids.to(input_device(model)),
        norms={norm: frozen_norm(norm, _widened(at)) for norm, at in norm_inputs.items()},
        patterns=patterns,
        mlp_outputs=[activations[site] for site in outputs],
        mlp_others=others,
        activations={site: activations[site] for site in extra},
    )


@opens_on_model
@contextmanager
def frozen(model: PreTrainedModel, run: FrozenRun, *, mlps: bool = False) -> Iterator[None]:
    """Freeze norm scales and attention patterns at a recorded run inside the `with` block.

    Each norm is then a linear map plus its bias, each head a fixed linear map of the residual stream. With `mlps` the
    outputs of the MLP modules are constants too, so that the final hidden states are an affine function of the
    embeddings and of everything that is added to the residual stream. (A soft-cap on the logits, as in Gemma 2, is not
    frozen.) On the recorded prompt the model computes what it always does, up to rounding. Gradients go through values
    and norms, and through MLPs unless these are frozen.

    Only the positions of the recorded prompt are frozen. Tokens after it, such as those that `generate` adds, have
    their norms, patterns and MLPs computed freely, with or without a cache.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            The model that was recorded, plain or wrapped. It runs in the mode it is in: with dropout it is another one.
        run ([`FrozenRun`]):
            Result of [`record_frozen`]. One recorded prompt serves batches of any size that repeat it; of several,
            each belongs to one row of the batch.
        mlps (`bool`, *optional*, defaults to `False`):
            Whether to freeze the outputs of the MLPs.

    Raises:
        [`TranscoderError`]: inside the block, the model is called with another prompt than the recorded one. Called
            with `inputs_embeds`, it only has to have their number of tokens.

    Example:

    ```python
    >>> run = record_frozen(model, input_ids)
    >>> with frozen(model, run, mlps=True), capture(model, "layers.8.mlp.in", stop=False) as activations:
    ...     model(input_ids)
    ...     # The gradient of a feature of layer 8 at the last token, through linear paths alone.
    ...     (activations["layers.8.mlp.in"][0, -1] @ encoder_row).backward()
    ```
    """
    hold = _Hold(run)
    with ExitStack() as stack:
        before_forward(stack, model, hold.begin)
        for norm, linear in run.norms.items():
            hold.module(stack, norm, functools.partial(_norm_at, linear, norm_bias(norm)))
        if mlps:
            for layer, output in enumerate(run.mlp_outputs):
                constant = functools.partial(_constant, output)
                hold.module(stack, locate(model, Site("mlp.out", layer)).module, constant, run.mlp_others[layer])
        stack.enter_context(edit_attention(model, pattern=hold.pattern))
        yield


class _Hold(threading.local):
    """Puts recorded values at the positions of the recorded prompt. Each thread has its own current forward pass."""

    def __init__(self, run: FrozenRun):
        self.run = run
        self.tokens = None
        # Number of frozen positions of the current forward pass: those of the prompt, or 0.
        self.count = 0

    def begin(self, tokens: ForwardTokens):
        prompts = self.run.input_ids
        rows, length = prompts.shape
        self.tokens = tokens
        self.count = 0 if tokens.start >= length else length
        if self.count == 0:
            return
        if tokens.start > 0 or tokens.length < length or rows not in (1, tokens.batch):
            raise TranscoderError(
                f"The frozen run is of {rows} prompts with {length} tokens, and the model got tokens {tokens.start} to "
                f"{tokens.start + tokens.length - 1} of {tokens.batch} rows: give it the recorded prompts, whole."
            )
        if tokens.real is not None:
            raise TranscoderError(
                "The frozen run has no padding, but the model got padded input: give it prompts of one length, or one at a time."
            )
        if tokens.input_ids is not None and not (tokens.input_ids[:, :length] == prompts).all():
            raise TranscoderError(
                "The model got another prompt than the one it is frozen at: record the run of this prompt, or use a mode "
                "in which nothing is frozen."
            )

    def module(
        self, stack: ExitStack, module: nn.Module, function: Callable[[torch.Tensor], torch.Tensor], others: tuple = ()
    ):
        """Let `function` compute the frozen positions of a module's output from those of its input."""

        def forward(original, hidden_states):
            if self.count == 0:
                return original(hidden_states)
            # Some modules see batch and positions as one axis.
            shaped = hidden_states.reshape(self.tokens.batch, self.tokens.length, -1)
            output = function(shaped[:, : self.count])
            if self.count < self.tokens.length:
                free = original(shaped[:, self.count :].contiguous())
                output = torch.cat([output, free[0] if others else free], dim=1)
            output = output.reshape(*hidden_states.shape[:-1], -1)
            return (output, *others) if others else output

        wrap_forward(stack, module, forward)

    def pattern(self, pattern: torch.Tensor, layer: int) -> torch.Tensor | None:
        if self.count == 0:
            return None
        # The prompt does not attend to later positions or to the free places of a cache.
        recorded = F.pad(self.run.patterns[layer], (0, pattern.shape[-1] - self.count))
        recorded = recorded.expand(len(pattern), -1, -1, -1)
        return torch.cat([recorded, pattern[:, :, self.count :]], dim=2)


def keep_others(stack: ExitStack, model: PreTrainedModel, layer: int, others: list[tuple]) -> None:
    """Set `others[layer]` to the other outputs of the module of the layer's `mlp.out` in every forward pass until `stack` closes."""

    def keep(module, args, output):
        others[layer] = output[1:] if isinstance(output, tuple) else ()

    after_call(stack, locate(model, Site("mlp.out", layer)).module, keep)


def _norms(model) -> list[nn.Module]:
    """Every norm on or before the residual stream, each once."""
    architecture = architecture_of(model)
    names = {
        architecture.attention_norm,
        architecture.mlp_norm,
        architecture.attention_post_norm,
        architecture.mlp_post_norm,
    } - {None}
    blocks = decoder_blocks(model)
    return [*(block.get_submodule(name) for block in blocks for name in sorted(names)), final_norm(model)]


def _norm_at(linear, bias, hidden_states):
    return (linear(_widened(hidden_states)) + bias).to(hidden_states.dtype)


def _constant(recorded, hidden_states):
    return recorded.expand(len(hidden_states), -1, -1)


def _widened(tensor):
    """Half precision to fp32, in which norms take their scale."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
