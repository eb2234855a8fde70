"""The dictionary of one layer of a cross-layer transcoder, which writes at several output sites."""

from dataclasses import dataclass
from typing import Self

import torch

from ...errors import TranscoderError
from ..activations import Encoded, token_mean
from ..modeling_transcoder import TranscoderModel, TranscoderOutput, buffer_shapes, parameter_shapes
from .configuration_cross_layer import CrossLayerSourceConfig


def source_parameter_shapes(config: CrossLayerSourceConfig) -> dict[str, tuple[int, ...] | None]:
    """The shape of each parameter of one layer; `None` for parameters that its configuration leaves out."""
    sites = len(config.output_sites)
    return {**parameter_shapes(config), "W_dec": (config.num_features, sites, config.d_out)}  # pyright: ignore[reportReturnType]


def source_buffer_shapes(config: CrossLayerSourceConfig) -> dict[str, tuple[int, ...]]:
    """The shape of each buffer of one layer."""
    shapes = buffer_shapes(config)
    if "output_scale" in shapes:
        shapes["output_scale"] = (len(config.output_sites), *shapes["output_scale"])
    return shapes


class CrossLayerSource(TranscoderModel):
    """
    The dictionary of one layer of a [`CrossLayerTranscoder`]: it encodes at its input site, and its features write at the
    output site of its own layer and at later ones. It is used wherever a [`TranscoderModel`] is, except for training and
    files, which are those of the whole.

    `W_dec (num_features, sites, d_out)` holds the decoder rows of a feature one after the other, so that writing gathers
    one long row for each active feature. Bias and skip connection write at the first site, that of the own layer.
    """

    config: CrossLayerSourceConfig
    config_class = CrossLayerSourceConfig
    parameter_shapes = staticmethod(source_parameter_shapes)
    buffer_shapes = staticmethod(source_buffer_shapes)

    @property
    def decoder_weight(self) -> torch.Tensor:
        """Decoder rows `(num_features, sites * d_out)`, those of all sites one after the other."""
        return self.W_dec.flatten(1)

    def at(self, site: str) -> "SourceAtSite":
        """The tensors that linear maps need, with the decoder of one site.

        Args:
            site (`str`): One of `config.output_sites`.
        """
        number = self.config.output_sites.index(site)
        own = number == 0
        return SourceAtSite(
            config=self.config,
            W_enc=self.W_enc,
            W_dec=self.W_dec[:, number],
            b_dec=self.b_dec if own else None,
            b_pre=None,
            W_skip=self.W_skip if own else None,
            input_mean=getattr(self, "input_mean", None),
            input_scale=getattr(self, "input_scale", None),
            output_mean=getattr(self, "output_mean", None) if own else 0.0,
            output_scale=self.output_scale[number] if self.config.normalization != "none" else None,
        )

    def written(self, encoded: Encoded, rows: torch.Tensor) -> torch.Tensor:
        """
        The writes of the features of one batch, with the bias and skip connection at the own site.

        Args:
            encoded ([`Encoded`]): Features.
            rows (`torch.Tensor` of shape `(rows, d_in)`): Normalized inputs.

        Returns:
            `torch.Tensor` of shape `(rows, sites, d_out)`, normalized.
        """
        return self._decode_rows(encoded, rows).unflatten(1, (-1, self.config.d_out))  # pyright: ignore[reportArgumentType]

    def _add_linear_part(self, reconstruction, inputs):
        own, later = reconstruction.split([self.config.d_out, reconstruction.shape[1] - self.config.d_out], dim=1)
        own = super()._add_linear_part(own, inputs)
        return torch.cat([own, later], dim=1) if later.shape[1] else own

    def normalize_output(self, targets: torch.Tensor, inputs: torch.Tensor | None = None) -> torch.Tensor:
        """Normalizes targets of the own site to the scale of the loss."""
        if self.config.normalization != "none":
            targets = (targets.float() - self.output_mean) / self.output_scale[0]
        return targets

    def denormalize_output(self, reconstruction: torch.Tensor, inputs: torch.Tensor | None = None) -> torch.Tensor:
        """Converts a reconstruction of the own site back to its units."""
        if self.config.normalization != "none":
            reconstruction = reconstruction * self.output_scale[0] + self.output_mean
        return reconstruction

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, inputs: torch.Tensor, output_features: bool = True
    ) -> TranscoderOutput:
        """
        Args:
            inputs (`torch.Tensor` of shape `(..., d_in)`): Activations at the input site.
            output_features (`bool`, *optional*, defaults to `True`): Whether to return all features densely.

        Returns:
            [`TranscoderOutput`], whose `reconstruction` is a `dict` from output site to what this layer writes there,
            `(..., d_out)`: the sum over layers is the reconstruction of a site.
        """
        self._check_width(inputs, self.config.d_in, "inputs")
        lead = inputs.shape[:-1]
        rows = self.normalize_input(inputs.reshape(-1, inputs.shape[-1]))
        encoded = self.activation.encode(self, rows)
        written = self.written(encoded, rows)
        reconstruction = {}
        for number, (site, part) in enumerate(zip(self.config.output_sites, written.unbind(1), strict=True)):
            if self.config.normalization != "none":
                part = self.denormalize_output(part) if number == 0 else part * self.output_scale[number]
            reconstruction[site] = part.view(*lead, self.config.d_out)
        return TranscoderOutput(reconstruction=reconstruction, **self._features_of(encoded, lead, output_features))

    def decode(self, features: torch.Tensor, inputs: torch.Tensor | None = None) -> torch.Tensor:
        raise TranscoderError(
            "One layer of a cross-layer transcoder has no separate reconstruction: call the whole, or the layer for its writes "
            "at each site."
        )

    def losses_of(
        self, rows, targets, encoded, reconstruction, residuals, mask, batch_mean, dead_features, sparsity_scale
    ) -> dict[str, torch.Tensor]:
        """
        The loss terms of this layer: the error at its own site, the penalties of its features, and the AuxK loss of its dead
        features, which predict what is missed at all sites that they write at.

        Args:
            rows (`torch.Tensor` of shape `(rows, d_in)`): Normalized inputs.
            targets, reconstruction (`torch.Tensor` of shape `(rows, d_out)`): Normalized, at the own site.
            encoded ([`Encoded`]): Features.
            residuals (`torch.Tensor` of shape `(rows, sites * d_out)`, *optional*):
                What is missed at all sites, if there are dead features.
            mask, batch_mean, dead_features, sparsity_scale: As in [`TranscoderModel`].
        """
        squared = (reconstruction.float() - targets).square().sum(-1)
        losses = self._losses(rows, targets, encoded, reconstruction, squared, mask, batch_mean, None, sparsity_scale)
        if self.config.tanh_coefficient:
            losses["tanh_loss"] = sparsity_scale * token_mean(
                self.tanh_penalty(encoded.to_dense(self.config.num_features)), mask
            )
        if residuals is not None:
            losses["auxk_loss"] = token_mean(self._auxk(rows, residuals, dead_features, batch_mean), mask)
        return losses

    def tanh_penalty(self, features: torch.Tensor) -> torch.Tensor:
        """
        `tanh_coefficient * sum of tanh(tanh_scale * feature * norm of all its decoder rows)` of every token (Ameisen et al.
        2025).

        Args:
            features (`torch.Tensor` of shape `(rows, num_features)`): Feature activations.

        Returns:
            `torch.Tensor` of shape `(rows,)`, at least in fp32.
        """
        features = features.to(torch.promote_types(features.dtype, torch.float32))
        weighted = self.config.tanh_scale * features * self.decoder_weight.norm(dim=-1)
        return self.config.tanh_coefficient * weighted.tanh().sum(-1)

    def _auxk(self, rows, residual, dead_features, batch_mean):
        """Mean over sites of the AuxK loss of the residual of each, so that no site outweighs the others."""
        residual = residual.detach().unflatten(1, (-1, self.config.d_out))
        missed = residual - self._dead_prediction(rows, dead_features).view_as(residual)
        energy = batch_mean(residual.square().sum(-1)).clamp(min=1e-12)
        return self._auxk_weight(dead_features) * (missed.square().sum(-1) / energy).mean(-1)

    def fold_decoder_norm_(self) -> Self:
        raise TranscoderError(
            "Decoder rows of a cross-layer transcoder are not kept at unit norm: leave them as they are."
        )

    def _save_files(self, folder, *args, **kwargs) -> None:
        raise TranscoderError("One layer of a cross-layer transcoder cannot be saved alone: save the whole.")


@dataclass(frozen=True)
class SourceAtSite:
    """The tensors of a [`CrossLayerSource`] for one of its output sites, under the names of a [`TranscoderModel`]."""

    config: CrossLayerSourceConfig
    W_enc: torch.Tensor
    W_dec: torch.Tensor
    b_dec: torch.Tensor | None
    b_pre: None
    W_skip: torch.Tensor | None
    input_mean: torch.Tensor | None
    input_scale: torch.Tensor | None
    output_mean: torch.Tensor | float | None
    output_scale: torch.Tensor | None
