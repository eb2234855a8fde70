"""Reads from and writes to the residual stream: their order, their norms and their directions."""

import torch
from torch import nn
from transformers import PreTrainedModel

from ..errors import TranscoderError
from .architectures import architecture_of, decoder_blocks, final_norm, has_parallel_residual
from .linear_maps import apply_weight, map_size
from .norms import FrozenNorm, NormGain, frozen_norm, norm_gain
from .order import POINTS, Point, reading_step
from .sites import Site


#: Name of the language-model head in errors about its weights.
UNEMBEDDING = "the unembedding"


def reads_from_stream(site: Site) -> bool:
    """Whether the value at a site is the residual stream, or the stream after a norm."""
    return POINTS.get(site.point, Point()).reads is not None


def writes_to_stream(site: Site) -> bool:
    """Whether the value at a site is added to the residual stream (after a post-norm, if any), or is the stream."""
    return POINTS.get(site.point, Point()).writes is not None


def reading_stage(model: PreTrainedModel, site: Site) -> int:
    """The stage at which a site reads the stream: it sees everything that was written at this stage or an earlier one.

    Layer l begins at stage 2l; its attention writes at 2l + 1, and its MLP, which reads then, at 2l + 2. With a parallel
    residual both read at 2l and write at 2l + 2.
    """
    _check(reads_from_stream(site), site, "does not read the residual stream")
    return 2 * site.layer + max(reading_step(site.point, has_parallel_residual(model)) - 1, 0)


def writing_stage(model: PreTrainedModel, site: Site) -> int:
    """The stage at which a write to a site is in the stream; see [`reading_stage`]."""
    _check(writes_to_stream(site), site, "does not write to the residual stream")
    point = POINTS[site.point]
    in_parallel = point.reads is None and has_parallel_residual(model)
    return 2 * site.layer + (2 if in_parallel else min(point.writes, 2))


def norm_before(model: PreTrainedModel, site: Site) -> nn.Module | None:
    """The norm between the stream and a site that reads it, or `None` where the site is the stream."""
    _check(reads_from_stream(site), site, "does not read the residual stream")
    if _is_stream(site):
        return None
    architecture = architecture_of(model)
    name = architecture.attention_norm if site.point == "attn.in" else architecture.mlp_norm
    return None if name is None else _submodule(model, site, name)


def norm_after(model: PreTrainedModel, site: Site) -> nn.Module | None:
    """The post-norm between a site and the stream that it writes to, or `None` where there is none."""
    _check(writes_to_stream(site), site, "does not write to the residual stream")
    if site.point not in ("attn.out", "mlp.out"):
        return None
    architecture = architecture_of(model)
    name = architecture.attention_post_norm if site.point == "attn.out" else architecture.mlp_post_norm
    return None if name is None else _submodule(model, site, name)


def stream_before(model: PreTrainedModel, site: Site) -> Site:
    """The point of the residual stream that a site reads."""
    stage = reading_stage(model, site)
    return Site("resid_mid" if stage % 2 else "resid_pre", site.layer) if not _is_stream(site) else site


def read_directions(model: PreTrainedModel, site: Site, rows: torch.Tensor) -> torch.Tensor:
    """Read vectors at a site, `(..., width)`, as read vectors of the residual stream, without the scale of the norm between."""
    norm = norm_before(model, site)
    return rows if norm is None else norm_gain(norm, rows.shape[-1]).pull(rows)


def written_directions(model: PreTrainedModel, site: Site, rows: torch.Tensor) -> torch.Tensor:
    """Directions at a site, `(..., width)`, as directions of the residual stream, without the scale of a post-norm, if any."""
    norm, multiplier = norm_after(model, site), multiplier_after(model, site)
    rows = rows if norm is None else norm_gain(norm, rows.shape[-1]).push(rows)
    return rows if multiplier == 1 else rows * multiplier


def multiplier_after(model: PreTrainedModel, site: Site) -> float:
    """Factor on values at a site before they are added to the stream, in addition to a post-norm."""
    _check(writes_to_stream(site), site, "does not write to the residual stream")
    return architecture_of(model).residual_multiplier if site.point in ("attn.out", "mlp.out") else 1.0


def map_after(norm: nn.Module | None, multiplier: float, at: torch.Tensor) -> FrozenNorm | None:
    """
    The linear map from a value at a site to what is added to the stream for it: [`norm_after`] at the scale that it has at
    `at (..., hidden)`, and [`multiplier_after`]; `None` where there is neither.
    """
    if norm is None:
        if multiplier == 1:
            return None
        return FrozenNorm(at.new_full((*at.shape[:-1], 1), multiplier), NormGain(at.new_ones(at.shape[-1]), False))
    linear = frozen_norm(norm, at)
    return FrozenNorm(linear.scale * multiplier, linear.gain)


def direct_logits(model: PreTrainedModel, rows: torch.Tensor) -> torch.Tensor:
    """Logits that directions of the residual stream write, `(..., vocabulary)` in the dtype of `rows`.

    Up to the scale of the final norm, with that of the logits; biases, a soft-cap and all that later layers make of them are left out.

    Args:
        model ([`~transformers.PreTrainedModel`]): A causal language model.
        rows (`torch.Tensor` of shape `(..., hidden)`): Directions, on the model's device.
    """
    unembedding = model.get_output_embeddings()
    width = map_size(unembedding)[1]
    if rows.shape[-1] != width:
        raise TranscoderError(
            f"The logits of this model are not read from the residual stream: it is {rows.shape[-1]} wide and the "
            f"unembedding {width}."
        )
    rows = norm_gain(final_norm(model), rows.shape[-1]).push(rows) * architecture_of(model).logit_multiplier
    return apply_weight(unembedding, rows, UNEMBEDDING)


def _is_stream(site):
    """Whether the value at a site is the stream itself: it is both read and written there."""
    return reads_from_stream(site) and writes_to_stream(site)


def _submodule(model, site, name):
    return decoder_blocks(model)[site.layer].get_submodule(name)


def _check(fits, site, what):
    if not fits:
        raise TranscoderError(
            f"'{site}' {what}, so nothing else connects to it by weights alone: use a dictionary from mlp.in to mlp.branch, "
            "or one on the stream."
        )
