"""The dictionary model: encoding, decoding, losses, and loading and saving."""

from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init
from transformers.utils import ModelOutput, logging

from ..errors import TranscoderError
from ..ops.sparse import firing_counts, sparse_decode, sparse_decode_error
from ..ops.topk import topk
from . import folding
from .activations import ACTIVATIONS, Activation, Encoded, token_mean
from .configuration_transcoder import TranscoderConfig
from .saved_model import SavedModel
from .token_norms import TokenStatistics, token_statistics


logger = logging.get_logger(__name__)


@dataclass
class TranscoderOutput(ModelOutput):
    """
    Output of a [`TranscoderModel`].

    Args:
        loss (`torch.FloatTensor` of shape `()`, *optional*, returned when `targets` are given):
            Sum of all loss terms.
        reconstruction (`torch.FloatTensor` of shape `(..., d_out)`):
            Predicted activations, in the units of the output site.
        features (`torch.FloatTensor` of shape `(..., num_features)`, *optional*, see `output_features`):
            Feature activations.
        feature_values, feature_indices (`torch.Tensor` of shape `(..., k)`, *optional*, TopK only; flat for BatchTopK in training):
            Activations and numbers of the active features. Also flat for JumpReLU and BatchTopK where a GPU kernel selects
            features above a threshold, which it does when no gradient is needed.
        feature_offsets (`torch.LongTensor` of shape `(rows + 1,)`, *optional*, with flat `feature_values`):
            Start of each row in the flat `feature_values`.
        feature_counts (`torch.FloatTensor` of shape `(num_features,)`, *optional*, TopK in training on a GPU with kernels):
            Number of tokens that each feature is active on.
        losses (`dict[str, torch.FloatTensor]`, *optional*, returned when `targets` are given):
            Loss terms by name, each of shape `()` and already weighted.
    """

    loss: torch.FloatTensor | None = None
    reconstruction: torch.FloatTensor | None = None
    features: torch.FloatTensor | None = None
    feature_values: torch.FloatTensor | None = None
    feature_indices: torch.LongTensor | None = None
    feature_offsets: torch.LongTensor | None = None
    feature_counts: torch.FloatTensor | None = None
    losses: dict[str, torch.FloatTensor] | None = None


def parameter_shapes(config: TranscoderConfig) -> dict[str, tuple[int, ...] | None]:
    """The shape of each parameter of a dictionary; `None` for parameters that its configuration leaves out."""
    n, d_in, d_out = config.num_features, config.d_in, config.d_out
    return {
        "W_enc": (n, d_in),
        "b_enc": (n,),
        "W_dec": None if config.tied else (n, d_out),
        "b_dec": (d_out,) if config.decoder_bias else None,
        "b_pre": (d_in,) if config.pre_bias else None,
        "W_skip": (d_out, d_in) if config.skip_connection else None,
        **dict.fromkeys(ACTIVATIONS[config.activation].parameters, (n,)),
    }


def buffer_shapes(config: TranscoderConfig) -> dict[str, tuple[int, ...]]:
    """The shape of each buffer of a dictionary."""
    shapes = {"threshold": ()} if config.activation == "batchtopk" else {}
    if config.has_site_scales:
        for side, width in (("input", config.d_in), ("output", config.d_out)):
            shapes |= {f"{side}_mean": (width,), f"{side}_scale": (width,)}
    return shapes


class TranscoderModel(SavedModel):
    r"""
    One sparse dictionary: `features = activation(W_enc x + b_enc)`, `reconstruction = W_decᵀ features + b_dec`.

    Parameters: `W_enc (num_features, d_in)`, `b_enc (num_features,)`, `W_dec (num_features, d_out)`, `b_dec (d_out,)`;
    depending on the configuration `b_pre (d_in,)`, `W_skip (d_out, d_in)`, `threshold (num_features,)`. Row i of
    `W_enc` and `W_dec` belongs to feature i.

    It behaves as any [`~transformers.PreTrainedModel`]: `from_pretrained`, `save_pretrained`, `push_to_hub`, `AutoModel`.

    Example:

    ```python
    >>> from hf_transcoders import TranscoderConfig, TranscoderModel

    >>> model = TranscoderModel(TranscoderConfig(d_in=576, num_features=4608, activation="topk", k=64))
    >>> output = model(activations)
    >>> output.features.shape, output.reconstruction.shape
    ```
    """

    config: TranscoderConfig
    # For type checkers, which know nothing of `register_parameter`: what the configuration leaves out is `None` or absent.
    W_enc: nn.Parameter
    b_enc: nn.Parameter
    W_dec: nn.Parameter
    b_dec: nn.Parameter
    b_pre: nn.Parameter | None
    W_skip: nn.Parameter | None
    r_mag: nn.Parameter
    b_mag: nn.Parameter
    threshold: torch.Tensor
    input_mean: torch.Tensor
    input_scale: torch.Tensor
    output_mean: torch.Tensor
    output_scale: torch.Tensor
    config_class: type[TranscoderConfig] = TranscoderConfig
    #: Equal for dictionaries that write at one place together; `None` for one that stands there alone.
    group: object = None
    base_model_prefix = "transcoder"
    main_input_name = "inputs"
    # The loss is a mean over the batch; the Trainer divides it under gradient accumulation.
    accepts_loss_kwargs = False
    _keep_in_fp32_modules_strict = ["threshold", "input_mean", "input_scale", "output_mean", "output_scale"]
    _no_split_modules = ["TranscoderModel"]
    model_tags = ["hf_transcoders", "transcoder", "mechanistic-interpretability"]

    parameter_shapes = staticmethod(parameter_shapes)
    buffer_shapes = staticmethod(buffer_shapes)

    def __init__(self, config: TranscoderConfig):
        super().__init__(config)
        # `add_model_tags` appends to this list, and the list of the class is shared by all dictionaries.
        self.model_tags = list(self.model_tags)
        self.activation: Activation = ACTIVATIONS[config.activation]()
        for name, shape in self.parameter_shapes(config).items():
            self.register_parameter(name, None if shape is None else nn.Parameter(torch.empty(shape)))
        for name, shape in self.buffer_shapes(config).items():
            self.register_buffer(name, torch.empty(shape))
        self.post_init()

    @classmethod
    def tensor_shapes(cls, config: TranscoderConfig) -> dict[str, tuple[int, ...]]:
        """The shape of each saved tensor of a dictionary."""
        shapes = {**cls.parameter_shapes(config), **cls.buffer_shapes(config)}
        return {name: shape for name, shape in shapes.items() if shape is not None}

    def _init_weights(self, module):
        if module is not self:
            return
        config = self.config
        # Rows of unit norm: a pre-activation then has the scale of one coordinate of its input.
        init.copy_(self.W_enc, F.normalize(torch.randn(self.W_enc.shape, device=self.W_enc.device), dim=-1))
        init.zeros_(self.b_enc)
        if self.W_dec is not None:
            if config.decoder_init == "zero":
                init.zeros_(self.W_dec)
            elif config.decoder_init == "transpose" and config.d_in == config.d_out:
                init.copy_(self.W_dec, self.W_enc)
            else:
                rows = torch.randn(self.W_dec.shape, device=self.W_dec.device)
                init.copy_(self.W_dec, F.normalize(rows, dim=-1))
        for parameter in (self.b_dec, self.b_pre, self.W_skip):
            if parameter is not None:
                init.zeros_(parameter)
        for name, start in self.activation.parameters.items():
            init.constant_(getattr(self, name), getattr(config, start) if isinstance(start, str) else start)
        if config.activation == "batchtopk":
            init.zeros_(self.threshold)
        if config.has_site_scales:
            init.zeros_(self.input_mean)
            init.zeros_(self.output_mean)
            init.ones_(self.input_scale)
            init.ones_(self.output_scale)

    # ------------------------------------------------------------------------------------------------ the function

    def at(self, site: str) -> "TranscoderModel":
        """The dictionary with the decoder of one of its output sites: itself, because it has one."""
        return self

    @property
    def encoder_weight(self) -> torch.Tensor:
        """Effective encoder rows `(num_features, d_in)`: normalized to unit norm in a tied dictionary."""
        return F.normalize(self.W_enc, dim=-1) if self.config.tied else self.W_enc

    @property
    def decoder_weight(self) -> torch.Tensor:
        """Effective decoder rows `(num_features, d_out)`."""
        return self.encoder_weight if self.config.tied else self.W_dec

    def normalize_input(self, inputs: torch.Tensor) -> torch.Tensor:
        """Normalizes and centers inputs as `W_enc` expects them."""
        if self.config.has_site_scales:
            inputs = (inputs.float() - self.input_mean) / self.input_scale
        elif self.config.normalization != "none":
            token = token_statistics(self.config.normalization, inputs)
            inputs = (inputs.float() - token.mean) / token.divisor
        inputs = inputs.to(self.W_enc.dtype)
        return inputs if self.b_pre is None else inputs - self.b_pre

    def normalize_output(self, targets: torch.Tensor, inputs: torch.Tensor | None = None) -> torch.Tensor:
        """Normalizes targets to the scale of the loss; where each token has a scale of its own, by that of its input."""
        if self.config.has_site_scales:
            return (targets.float() - self.output_mean) / self.output_scale
        if self.config.normalization == "none":
            return targets
        token = self._token_statistics(inputs)
        return (targets.float() - token.mean) / token.divisor

    def denormalize_output(self, reconstruction: torch.Tensor, inputs: torch.Tensor | None = None) -> torch.Tensor:
        """Converts a reconstruction back to the units of the output site; where each token has a scale, by its input."""
        if self.config.has_site_scales:
            return reconstruction * self.output_scale + self.output_mean
        if self.config.normalization == "none":
            return reconstruction
        token = self._token_statistics(inputs)
        return reconstruction * token.scale + token.mean

    def _token_statistics(self, inputs: torch.Tensor | None) -> TokenStatistics:
        if inputs is None:
            raise TranscoderError(
                f"This dictionary scales each token by itself (`normalization='{self.config.normalization}'`): give the inputs as well."
            )
        return token_statistics(self.config.normalization, inputs)

    def pre_activations(self, inputs: torch.Tensor) -> torch.Tensor:
        """`inputs @ W_enc.T + b_enc` for inputs normalized by [`~TranscoderModel.normalize_input`]."""
        return F.linear(inputs, self.encoder_weight, self.b_enc)

    def encode(self, inputs: torch.Tensor) -> torch.Tensor:
        """
        Computes feature activations.

        Args:
            inputs (`torch.Tensor` of shape `(..., d_in)`): Activations at the input site.

        Returns:
            `torch.Tensor` of shape `(..., num_features)`.
        """
        self._check_width(inputs, self.config.d_in, "inputs")
        rows = self.normalize_input(inputs.reshape(-1, inputs.shape[-1]))
        features = self.activation.encode(self, rows).to_dense(self.config.num_features)
        return features.view(*inputs.shape[:-1], self.config.num_features)

    def decode(self, features: torch.Tensor, inputs: torch.Tensor | None = None) -> torch.Tensor:
        """
        Computes the reconstruction from feature activations.

        Args:
            features (`torch.Tensor` of shape `(..., num_features)`): Feature activations.
            inputs (`torch.Tensor` of shape `(..., d_in)`, *optional*):
                Activations at the input site, required by a dictionary with a skip connection or a scale for each token.

        Returns:
            `torch.Tensor` of shape `(..., d_out)`.
        """
        if self.W_skip is not None and inputs is None:
            raise TranscoderError(
                "This dictionary has a skip connection: give `decode` the inputs as well as the features."
            )
        if features.shape[-1] != self.config.num_features:
            raise TranscoderError(
                f"The features are {features.shape[-1]} wide and this dictionary has {self.config.num_features}: "
                "give the output of its own `encode`."
            )
        centered = None if self.W_skip is None else self.normalize_input(inputs)
        reconstruction = F.linear(features.to(self.W_enc.dtype), self.decoder_weight.T)
        return self.denormalize_output(self._add_linear_part(reconstruction, centered), inputs)

    def _decode_rows(self, encoded: Encoded, inputs: torch.Tensor) -> torch.Tensor:
        """Normalized reconstruction of normalized inputs `(rows, d_in)`."""
        if encoded.dense is not None:
            reconstruction = F.linear(encoded.dense, self.decoder_weight.T)
        else:
            reconstruction = sparse_decode(
                encoded.offsets, encoded.indices, encoded.values, self.decoder_weight, encoded.order
            )
        return self._add_linear_part(reconstruction, inputs)

    def _decode_with_error(
        self, encoded: Encoded, inputs: torch.Tensor, targets: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Normalized reconstruction of normalized inputs `(rows, d_in)`, and its squared error `(rows,)` in fp32."""
        if encoded.dense is not None:
            reconstruction = self._decode_rows(encoded, inputs)
            return reconstruction, _squared_error(reconstruction, targets)
        return sparse_decode_error(
            encoded.offsets,
            encoded.indices,
            encoded.values,
            self.decoder_weight,
            self._linear_terms(inputs),
            targets,
            encoded.order,
        )

    def _linear_terms(self, inputs: torch.Tensor) -> list[torch.Tensor]:
        """What is written besides the features: `(d_out,)` or `(rows, d_out)` each."""
        terms = [] if self.b_dec is None else [self.b_dec]
        return terms if self.W_skip is None else [*terms, F.linear(inputs, self.W_skip)]

    def _add_linear_part(self, reconstruction, inputs):
        for term in self._linear_terms(inputs):
            reconstruction = reconstruction + term
        return reconstruction

    def forward(
        self,
        inputs: torch.Tensor,
        targets: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
        dead_features: torch.LongTensor | None = None,
        sparsity_scale: float = 1.0,
        output_features: bool = True,
        across_processes: bool = False,
    ) -> TranscoderOutput:
        """
        Args:
            inputs (`torch.Tensor` of shape `(..., d_in)`):
                Activations at the input site.
            targets (`torch.Tensor` of shape `(..., d_out)`, *optional*):
                Activations at the output site, to compute the loss.
            mask (`torch.BoolTensor` of shape `(...)`, *optional*):
                Tokens that count in the loss. All by default.
            dead_features (`torch.LongTensor` of shape `(n_dead,)`, *optional*):
                Features that have not fired for a long time, to be revived by the AuxK loss.
            sparsity_scale (`float`, *optional*, defaults to 1.0):
                Factor of the L1 and L0 penalties, for their warm-up.
            output_features (`bool`, *optional*, defaults to `True`):
                Whether to return all features densely. Activations that compute all features return them in any case.
            across_processes (`bool`, *optional*, defaults to `False`):
                Whether the batch is one process's part of a larger batch. Averages over the batch inside a loss (the energy
                in the AuxK loss, the L0 compared with `target_l0`) are then taken over all processes, so that the mean of
                their gradients is the gradient of the larger batch.

        Returns:
            [`TranscoderOutput`]
        """
        config = self.config
        self._check_width(inputs, config.d_in, "inputs")
        lead = inputs.shape[:-1]
        flat_inputs = inputs.reshape(-1, inputs.shape[-1])
        rows = self.normalize_input(flat_inputs)
        encoded = self.activation.encode(self, rows)

        loss = losses = None
        if targets is None:
            normalized = self._decode_rows(encoded, rows)
        else:
            self._check_width(targets, config.d_out, "targets")
            self._check_tokens(targets.shape[:-1], lead, "targets")
            if mask is not None:
                self._check_tokens(mask.shape, lead, "mask")
            if not len(rows):
                raise TranscoderError("There are no tokens for a loss: give at least one, or no `targets`.")
            flat_targets = targets.reshape(-1, targets.shape[-1])
            flat_targets = self.normalize_output(flat_targets, flat_inputs).to(torch.float32)
            flat_mask = None if mask is None else mask.reshape(-1)
            batch_mean = partial(token_mean, mask=flat_mask, across_processes=across_processes)
            normalized, squared = self._decode_with_error(encoded, rows, flat_targets)
            losses = self._losses(
                rows, flat_targets, encoded, normalized, squared, flat_mask, batch_mean, dead_features, sparsity_scale
            )
            loss = sum(losses.values())

        return TranscoderOutput(
            loss=loss,
            reconstruction=self.denormalize_output(normalized, flat_inputs).view(*lead, config.d_out),
            losses=losses,
            **self._features_of(encoded, lead, output_features),
        )

    def _features_of(
        self, encoded: Encoded, lead: torch.Size, output_features: bool
    ) -> dict[str, torch.Tensor | None]:
        """The fields of a [`TranscoderOutput`] that hold features, for inputs `(*lead, d_in)`."""
        config = self.config
        values, indices, offsets = encoded.values, encoded.indices, encoded.offsets
        counts = None
        if encoded.order is not None and values.requires_grad:
            counts = firing_counts(offsets, indices, values, config.num_features, encoded.order)
        if config.activation == "topk":
            values, indices, offsets = values.view(*lead, config.k), indices.view(*lead, config.k), None
        features = None
        if output_features or encoded.dense is not None:
            features = encoded.to_dense(config.num_features).view(*lead, config.num_features)
        return {
            "features": features,
            "feature_values": values,
            "feature_indices": indices,
            "feature_offsets": offsets,
            "feature_counts": counts,
        }

    # ------------------------------------------------------------------------------------------------ the loss

    def reconstruction_error(
        self, reconstruction: torch.Tensor, targets: torch.Tensor, mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """
        Squared error of every token, scaled by `config.loss_reduction`.

        Args:
            reconstruction, targets (`torch.Tensor` of shape `(rows, d_out)`): Normalized reconstruction and targets.
            mask (`torch.BoolTensor` of shape `(rows,)`, *optional*): Tokens whose variance scales the error.

        Returns:
            `torch.Tensor` of shape `(rows,)`, float32; its mean is the reconstruction loss.
        """
        return self._scaled_error(_squared_error(reconstruction, targets), targets, mask)

    def _scaled_error(self, squared, targets, mask):
        """Squared error `(rows,)`, summed over dimensions, on the scale of `config.loss_reduction`."""
        reduction = self.config.loss_reduction
        if reduction == "sum":
            return squared
        if reduction == "mean":
            return squared / targets.shape[-1]
        if reduction == "target_norm":
            return squared / targets.shape[-1] / targets.norm(dim=-1).clamp(min=1e-8)
        variance = self.config.target_variance
        if variance is None:
            # NaN without any variance, as for one token: the scale of the error is then not defined.
            variance, constant = _variance(targets, mask)
            undefined = constant if mask is None else constant & mask.any()
            variance = torch.where(undefined, torch.nan, variance.clamp(min=1e-12))
        return squared / variance

    def _losses(
        self, rows, targets, encoded, reconstruction, squared, mask, batch_mean, dead_features, sparsity_scale
    ):
        config = self.config
        error = partial(self.reconstruction_error, targets=targets, mask=mask)
        if config.matryoshka_sizes:
            per_token = self._matryoshka_error(rows, targets, encoded, error)
        else:
            per_token = self._scaled_error(squared, targets, mask)
        losses = {"reconstruction_loss": token_mean(per_token, mask)}
        penalties = self.activation.penalty(self, rows, encoded, error, batch_mean)
        for name, penalty in penalties.items():
            scale = 1.0 if name == "gate_loss" else sparsity_scale
            losses[name] = scale * token_mean(penalty, mask)
        if config.auxk_coefficient and dead_features is not None and dead_features.numel():
            residual = targets - reconstruction.float()
            auxk = self._auxk(rows, residual, dead_features, batch_mean)
            losses["auxk_loss"] = token_mean(auxk, mask)
        return losses

    def _matryoshka_error(self, rows, targets, encoded, error):
        """Mean error over the nested dictionaries, each of which adds one group of features to the one before."""
        sizes = self.config.matryoshka_sizes
        reconstruction = self._add_linear_part(torch.zeros_like(targets), rows)
        total = 0.0
        decoder = self.decoder_weight
        for start, end in zip([0, *sizes], sizes, strict=False):
            if encoded.dense is not None:
                reconstruction = reconstruction + F.linear(encoded.dense[:, start:end], decoder[start:end].T)
            else:
                inside = (encoded.indices >= start) & (encoded.indices < end)
                offsets = F.pad(inside.cumsum(0), (1, 0))[encoded.offsets]
                group = sparse_decode(offsets, encoded.indices[inside], encoded.values[inside], decoder)
                reconstruction = reconstruction + group
            total = total + error(reconstruction)
        return total / len(sizes)

    def _auxk(self, rows, residual, dead_features, batch_mean):
        """
        Squared error of the residual's reconstruction by the top dead features, over the squared norm of the residual
        (arXiv 2406.04093, A.2). The residual is a constant; encoder and decoder of the dead features learn.
        """
        residual = residual.detach()
        error = (residual - self._dead_prediction(rows, dead_features)).square().sum(-1)
        energy = batch_mean(residual.square().sum(-1)).clamp(min=1e-12)
        return self._auxk_weight(dead_features) * error / energy

    def _auxk_weight(self, dead_features: torch.Tensor) -> float:
        """Weight of the AuxK loss: a few dead features cannot explain much, so they weigh less than a full set."""
        return self.config.auxk_coefficient * min(1.0, dead_features.numel() / self.config.auxk)

    def _dead_prediction(self, rows: torch.Tensor, dead_features: torch.Tensor) -> torch.Tensor:
        """The reconstruction by the top dead features of each row, `(rows, d_out)`, in fp32."""
        k = min(self.config.auxk, dead_features.numel())
        # `index_select`, because the backward pass of plain indexing is several times slower on CPU.
        encoder = self.encoder_weight.index_select(0, dead_features)
        decoder = self.decoder_weight.index_select(0, dead_features)
        pre_activations = F.linear(rows, encoder, self.b_enc.index_select(0, dead_features)).float()
        chosen = topk(pre_activations.detach(), k)
        features = torch.zeros_like(pre_activations).scatter(1, chosen, pre_activations.gather(1, chosen).relu())
        return F.linear(features.to(decoder.dtype), decoder.T).float()

    def effective_l1_coefficient(self) -> float | None:
        """
        The equivalent L1 coefficient for a squared error that is summed over dimensions, as in the papers. `None` if it
        depends on data not yet seen.
        """
        config = self.config
        if config.loss_reduction == "sum":
            return config.l1_coefficient
        if config.loss_reduction == "mean":
            return config.l1_coefficient * config.d_out
        if config.loss_reduction == "normalized" and config.target_variance is not None:
            return config.l1_coefficient * config.target_variance
        return None

    # ------------------------------------------------------------------------------------------------ around training

    @torch.no_grad()
    def initialize_from_activations_(self, inputs: torch.Tensor, targets: torch.Tensor) -> "TranscoderModel":
        """
        Initializes normalization, `b_pre`, `b_enc`, `b_dec` and `config.target_variance` from a sample of activations. Of a
        dictionary that was trained before, only a missing `config.target_variance` is measured. Called before training.

        Args:
            inputs (`torch.Tensor` of shape `(tokens, d_in)`): Sample of activations at the input site.
            targets (`torch.Tensor` of shape `(tokens, d_out)`): Activations of the same tokens at the output site.

        Returns:
            [`TranscoderModel`]: itself.

        Raises:
            [`TranscoderError`]: the sample is empty, not finite, or the same for every token.
        """
        config = self.config
        inputs, targets = inputs.float(), targets.float()
        if not len(inputs):
            raise TranscoderError("There are no tokens to measure scales and biases on: give thousands of them.")
        if len(inputs) == 1:
            logger.warning("Scales and variance cannot be measured on one token, so the dictionary is left as it is.")
            return self
        for side, values in (("input", inputs), ("output", targets)):
            variance, constant = _variance(values)
            if not variance.isfinite() or constant:
                what = "the same for every token" if variance.isfinite() else "NaN, infinite or too large"
                site = getattr(config, f"{side}_site")
                raise TranscoderError(
                    f"The {side} activations{f' at {site}' if site else ''} are {what}, so there is nothing to learn: check "
                    "the site, the model and the text."
                )
        is_new = self._is_new()
        if is_new:
            self._measure_scales_(inputs, targets)
        targets = self.normalize_output(targets, inputs)
        mean_target = targets.mean(0)
        if config.target_variance is None:
            config.target_variance = (targets - mean_target).square().sum(-1).mean().item()
        if not is_new:
            return self
        if self.b_pre is not None:
            self.b_pre.zero_()
            self.b_pre.copy_(self.normalize_input(inputs).mean(0))
        if config.center_encoder:
            centered = -(self.encoder_weight @ self.normalize_input(inputs).mean(0))
            self.activation.shift_(self, centered - self.b_enc)
        if self.b_dec is not None and config.decoder_bias_init == "mean":
            self.b_dec.copy_(mean_target)
        return self

    def _measure_scales_(self, inputs: torch.Tensor, targets: torch.Tensor) -> None:
        for side, values in (("input", inputs), ("output", targets)):
            if self.config.normalization == "standardize":
                getattr(self, f"{side}_mean").copy_(values.mean(0))
                getattr(self, f"{side}_scale").copy_(values.std(0).clamp(min=1e-6))
            elif self.config.normalization == "scale":
                getattr(self, f"{side}_scale").fill_(values.square().mean().sqrt().clamp(min=1e-6))

    def _is_new(self) -> bool:
        """Whether nothing was learned or measured yet: the biases and means of a new dictionary are zero."""
        start = (getattr(self, name, None) for name in ("b_enc", "b_dec", "b_pre", "input_mean", "output_mean"))
        values = (value for value in start if isinstance(value, torch.Tensor))
        return self.config.target_variance is None and not any(value.any() for value in values)

    @torch.no_grad()
    def project_gradient_(self) -> None:
        """Before an optimizer step: removes the gradient along decoder rows that are kept at unit norm."""
        if self.config.decoder_norm == "unit" and self.W_dec is not None and self.W_dec.grad is not None:
            direction = F.normalize(self.W_dec, dim=-1)
            along = (self.W_dec.grad * direction).sum(-1, keepdim=True)
            self.W_dec.grad.sub_(along * direction)

    @torch.no_grad()
    def constrain_(self) -> None:
        """After an optimizer step: normalizes decoder rows and clamps JumpReLU thresholds at zero."""
        if self.config.decoder_norm == "unit" and self.W_dec is not None:
            self.W_dec.div_(self.W_dec.norm(dim=-1, keepdim=True).clamp(min=1e-8))
        if self.config.activation == "jumprelu":
            self.threshold.clamp_(min=0)

    @torch.no_grad()
    def update_threshold_(
        self, feature_values: torch.Tensor, decay: float = 0.99, across_processes: bool = False
    ) -> None:
        """
        After a training step of a BatchTopK dictionary: moves the inference threshold towards the smallest active feature
        of the batch.

        Args:
            feature_values (`torch.Tensor` of shape `(n_pairs,)`): `TranscoderOutput.feature_values` of the step.
            decay (`float`, *optional*, defaults to 0.99): Decay of the moving average.
            across_processes (`bool`, *optional*, defaults to `False`):
                Whether to move the threshold towards the mean over the batches of all processes.
        """
        if feature_values.numel() == 0:
            return
        smallest = torch.where(feature_values > 0, feature_values, torch.inf).min().float()
        smallest = torch.where(smallest.isfinite(), smallest, self.threshold)
        if across_processes:
            smallest = token_mean(smallest[None], None, across_processes=True)
        started = self.threshold > 0
        self.threshold.copy_(torch.where(started, decay * self.threshold + (1 - decay) * smallest, smallest))

    # ------------------------------------------------------------------------------------------------ same function, other weights

    def fold_normalization_(self) -> "TranscoderModel":
        """
        Folds input and output normalization into the weights without changing the function.

        Raises:
            [`TranscoderError`]: each token has a scale of its own, which no weights can hold.
        """
        return folding.fold_normalization_(self)

    def fold_pre_bias_(self) -> "TranscoderModel":
        """Folds `b_pre` into `b_enc` (and `b_dec` with a skip connection) without changing the function."""
        return folding.fold_pre_bias_(self)

    def fold_decoder_norm_(self) -> "TranscoderModel":
        """Scales every decoder row to unit norm, and its feature inversely, without changing the function."""
        return folding.fold_decoder_norm_(self)

    @staticmethod
    def _check_width(tensor, width, what):
        if tensor.shape[-1] != width:
            raise TranscoderError(
                f"The {what} are {tensor.shape[-1]} wide and this dictionary expects {width}: check that the site and "
                "the base model are those of its config."
            )

    @staticmethod
    def _check_tokens(found, expected, what):
        if found != expected:
            raise TranscoderError(
                f"The {what} are for tokens of shape {tuple(found)} and the inputs for {tuple(expected)}: give one of "
                "each for every token."
            )


def _squared_error(reconstruction: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Squared error of every row, summed over dimensions, in fp32."""
    return (reconstruction.float() - targets).square().sum(-1)


def _variance(values: torch.Tensor, mask: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean squared distance of rows from their mean, and whether it is zero up to the rounding of the mean."""
    variance = token_mean((values - token_mean(values, mask)).square().sum(-1), mask)
    energy = token_mean(values.square().sum(-1), mask)
    return variance, variance <= energy * (8 * torch.finfo(values.dtype).eps) ** 2
