"""The activation functions of dictionaries: one small class for each.

A new activation is one class with `encode` (and, if needed, `parameters`, `penalty`, `magnitude` and `shift_`), an entry in
`ACTIVATIONS` and its name in the configuration.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
import torch.nn.functional as F

from ..ops.pairs import SharedOrder
from ..ops.sparse import sparse_encode, sparse_encode_above, sparse_encode_topk, sparse_to_dense
from ..ops.straight_through import jumprelu, step
from ..ops.topk import batch_topk


if TYPE_CHECKING:
    from .modeling_transcoder import TranscoderModel


TokenFunction = Callable[[torch.Tensor], torch.Tensor]


@dataclass
class Encoded:
    """
    Features of a batch of rows, dense or sparse.

    Args:
        dense (`torch.Tensor` of shape `(rows, num_features)`, *optional*):
            All features, if the activation computes all of them.
        offsets, indices, values (`torch.Tensor`, *optional*):
            Active features only, in the layout of `ops.sparse`, if the activation computes few.
        order ([`SharedOrder`], *optional*):
            The order of the active features in which gradients are summed, for the decoder to share.
        pre_activations (`torch.Tensor` of shape `(rows, num_features)`, *optional*):
            Pre-activations, if the penalty of the activation needs them.
    """

    dense: torch.Tensor | None = None
    offsets: torch.Tensor | None = None
    indices: torch.Tensor | None = None
    values: torch.Tensor | None = None
    order: SharedOrder | None = None
    pre_activations: torch.Tensor | None = None

    def to_dense(self, num_features: int) -> torch.Tensor:
        if self.dense is not None:
            return self.dense
        return sparse_to_dense(self.offsets, self.indices, self.values, num_features)


class Activation:
    """Activation function on `x @ W_enc.T + b_enc`. Stateless: its parameters belong to the model."""

    #: Additional parameters of shape `(num_features,)` and their initial values (a number, or a field of the configuration).
    parameters: dict[str, float | str] = {}
    #: Names of those parameters that are rescaled together with the pre-activations.
    pre_activation_parameters: tuple[str, ...] = ()

    def encode(self, model: TranscoderModel, inputs: torch.Tensor) -> Encoded:
        """Features of `inputs (rows, d_in)`, which are already normalized and centered."""
        raise NotImplementedError

    def penalty(
        self, model: TranscoderModel, inputs: torch.Tensor, encoded: Encoded, error: TokenFunction, mean: TokenFunction
    ) -> dict[str, torch.Tensor]:
        """
        Loss terms besides the reconstruction, per token, each already weighted with its coefficient.

        Args:
            model ([`TranscoderModel`]): The dictionary.
            inputs (`torch.Tensor` of shape `(rows, d_in)`): Normalized inputs.
            encoded ([`Encoded`]): Their features.
            error (`Callable`): Scaled squared error `(rows,)` of a reconstruction `(rows, d_out)`.
            mean (`Callable`): Mean over the tokens of the batch of values `(rows, ...)`.
        """
        return {}

    def magnitude(self, model: TranscoderModel) -> tuple[torch.Tensor | float, torch.Tensor]:
        """
        Gain and bias `(num_features,)` of active features, which are `gain * (W_enc x) + bias`. A gain of one is a number.
        """
        return 1.0, model.b_enc

    def shift_(self, model: TranscoderModel, shift: torch.Tensor) -> None:
        """Adds `shift (num_features,)` to every pre-activation, to fold an input offset."""
        model.b_enc.add_(shift)


class ReLU(Activation):
    """Every positive pre-activation; sparse by an L1 penalty (arXiv 2406.11944, Eq. 5)."""

    def encode(self, model, inputs):
        return Encoded(dense=model.pre_activations(inputs).relu())

    def penalty(self, model, inputs, encoded, error, mean):
        return _l1(model, encoded.dense)


class TopK(Activation):
    """The k largest pre-activations of each token, rectified (arXiv 2406.04093, Eq. 2)."""

    def encode(self, model, inputs):
        order = SharedOrder()
        chosen = sparse_encode_topk(inputs, model.encoder_weight, model.b_enc, model.config.k, order)
        return Encoded(None, *chosen, order)


class BatchTopK(Activation):
    """k features per token on average over a training batch, a fixed threshold afterwards (arXiv 2412.06410)."""

    def encode(self, model, inputs):
        if not model.training:
            bias = _nan_where(model.threshold, model.b_enc)
            above = sparse_encode_above(inputs, model.encoder_weight, bias, model.threshold)
            if above is not None:
                return Encoded(None, *above)
            pre_activations = F.linear(inputs, model.encoder_weight, bias)
            return Encoded(dense=pre_activations * (pre_activations > model.threshold))
        total, order = model.config.k * inputs.shape[0], SharedOrder()
        chosen = sparse_encode(
            inputs, model.encoder_weight, model.b_enc, lambda scores: batch_topk(scores, total), order=order
        )
        return Encoded(None, *chosen, order)


class JumpReLU(Activation):
    """Pre-activations above a learned threshold; sparse by an L0 penalty (arXiv 2407.14435, Eq. 6 and 9)."""

    parameters = {"threshold": "threshold_init"}
    pre_activation_parameters = ("threshold",)

    def encode(self, model, inputs):
        bias = _nan_where(model.threshold, model.b_enc)
        above = sparse_encode_above(inputs, model.encoder_weight, bias, model.threshold)
        if above is not None:
            return Encoded(None, *above)
        pre_activations = F.linear(inputs, model.encoder_weight, bias)
        features = jumprelu(pre_activations, model.threshold, model.config.jumprelu_bandwidth)
        return Encoded(dense=features, pre_activations=pre_activations)

    def penalty(self, model, inputs, encoded, error, mean):
        config = model.config
        if not config.l0_coefficient:
            return {}
        if encoded.pre_activations is None:
            active = encoded.offsets.diff().float()
        else:
            active = step(encoded.pre_activations.float(), model.threshold, config.jumprelu_bandwidth).sum(-1)
        if config.target_l0 is not None:
            # The penalty is on the average L0; every token carries the same share of it.
            active = (mean(active) / config.target_l0 - 1).square().expand_as(active)
        return {"l0_loss": config.l0_coefficient * active}


class Gated(Activation):
    """A gate that decides which features are active and a magnitude for their activation (arXiv 2404.16014, Eq. 6 and 8)."""

    parameters = {"r_mag": 0.0, "b_mag": 0.0}
    pre_activation_parameters = ("b_mag",)

    def encode(self, model, inputs):
        products = F.linear(inputs, model.encoder_weight)
        gate = products + model.b_enc
        magnitude = products * model.r_mag.exp() + _nan_where(model.b_enc, model.b_mag)
        return Encoded(dense=magnitude.relu() * (gate > 0), pre_activations=gate)

    def penalty(self, model, inputs, encoded, error, mean):
        gate = encoded.pre_activations.relu()
        # The gate learns from its own reconstruction, through a decoder that must not learn from it (Eq. 8).
        frozen_bias = 0.0 if model.b_dec is None else model.b_dec.detach()
        reconstruction = F.linear(gate, model.decoder_weight.detach().T) + frozen_bias
        if model.W_skip is not None:
            reconstruction = reconstruction + F.linear(inputs, model.W_skip.detach())
        return {"gate_loss": error(reconstruction), **_l1(model, gate)}

    def magnitude(self, model):
        return model.r_mag.exp(), model.b_mag

    def shift_(self, model, shift):
        super().shift_(model, shift)
        model.b_mag.add_(model.r_mag.exp() * shift)


def token_mean(values: torch.Tensor, mask: torch.Tensor | None, across_processes: bool = False) -> torch.Tensor:
    """
    Mean of `values (rows, ...)` over the rows selected by `mask (rows,)`, or over all rows without a mask. With
    `across_processes` it is the mean over the rows of all processes, with the gradient of this process's own mean: processes
    average their gradients.
    """
    if mask is None:
        mean = values.mean(0)
    else:
        weights = mask.to(values.dtype).view(-1, *(1,) * (values.dim() - 1))
        mean = (values * weights).sum(0) / weights.sum().clamp(min=1)
    if not across_processes:
        return mean
    rows = torch.as_tensor(len(values) if mask is None else mask.sum(), dtype=mean.dtype, device=mean.device)
    sums = torch.cat([(mean.detach() * rows).reshape(-1), rows.reshape(1)])
    dist.all_reduce(sums)
    return mean + ((sums[:-1] / sums[-1].clamp(min=1)).view_as(mean) - mean.detach())


def _nan_where(suspect: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """
    `bias`, and NaN where `suspect` is NaN. Comparisons with NaN are false, so a feature would be silently off.
    """
    return torch.where(suspect.isnan(), torch.nan, bias)


def _l1(model, features):
    config = model.config
    if not config.l1_coefficient:
        return {}
    if config.l1_weighting == "decoder_norm":
        features = features * model.decoder_weight.norm(dim=-1)
    return {"l1_loss": config.l1_coefficient * features.float().sum(-1)}


ACTIVATIONS: dict[str, type[Activation]] = {
    "relu": ReLU,
    "topk": TopK,
    "batchtopk": BatchTopK,
    "jumprelu": JumpReLU,
    "gated": Gated,
}
