"""The dictionary: encode, decode, and everything that is trained in one forward."""

import math
import os
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.utils import ModelOutput, logging

from ..errors import TranscoderError
from ..files import atomic_directory
from ..ops.sparse import sparse_decode
from ..ops.topk import topk
from ..text.printable import printable
from . import folding
from .activations import ACTIVATIONS, Encoded, token_mean
from .configuration_transcoder import TranscoderConfig
from .saved_files import (
    HUB_ARGUMENTS,
    WEIGHT_FILES,
    Files,
    SavedDictionary,
    bounds,
    check_numbers,
    expect,
    open_dictionary,
    read_tensors,
)


logger = logging.get_logger(__name__)

# Where torch puts tensors of its own in memory: at multiples of so many bytes.
_ALIGNMENT = 64


@dataclass
class TranscoderOutput(ModelOutput):
    """
    What a [`TranscoderModel`] returns.

    Args:
        loss (`torch.FloatTensor` of shape `()`, *optional*, returned when `targets` are given):
            Sum of all loss terms.
        reconstruction (`torch.FloatTensor` of shape `(..., d_out)`):
            The predicted activations, in the units of the output site.
        features (`torch.FloatTensor` of shape `(..., num_features)`, *optional*, see `output_features`):
            Feature activations.
        feature_values, feature_indices (`torch.Tensor` of shape `(..., k)`, *optional*, TopK only; flat for BatchTopK in training):
            The active features and their numbers.
        feature_offsets (`torch.LongTensor` of shape `(rows + 1,)`, *optional*, BatchTopK in training):
            Where the part of each row begins in the flat `feature_values`.
        losses (`dict[str, torch.FloatTensor]`, *optional*, returned when `targets` are given):
            The terms of the loss by name, each of shape `()` and already weighted.
    """

    loss: torch.FloatTensor | None = None
    reconstruction: torch.FloatTensor | None = None
    features: torch.FloatTensor | None = None
    feature_values: torch.FloatTensor | None = None
    feature_indices: torch.LongTensor | None = None
    feature_offsets: torch.LongTensor | None = None
    losses: dict[str, torch.FloatTensor] | None = None


def parameter_shapes(config: TranscoderConfig) -> dict[str, tuple[int, ...] | None]:
    """The shape of each parameter of a dictionary; `None` for those that its configuration leaves out."""
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
    if config.normalization != "none":
        for side, width in (("input", config.d_in), ("output", config.d_out)):
            shapes |= {f"{side}_mean": (width,), f"{side}_scale": (width,)}
    return shapes


def tensor_shapes(config: TranscoderConfig) -> dict[str, tuple[int, ...]]:
    """The shape of everything that is saved of a dictionary."""
    shapes = {**parameter_shapes(config), **buffer_shapes(config)}
    return {name: shape for name, shape in shapes.items() if shape is not None}


class TranscoderModel(PreTrainedModel):
    r"""
    One sparse dictionary: `features = activation(W_enc x + b_enc)`, `reconstruction = W_decᵀ features + b_dec`.

    Parameters: `W_enc (num_features, d_in)`, `b_enc (num_features,)`, `W_dec (num_features, d_out)`, `b_dec (d_out,)`;
    where the configuration asks for them `b_pre (d_in,)`, `W_skip (d_out, d_in)`, `threshold (num_features,)`. Row i of
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
    config_class = TranscoderConfig
    base_model_prefix = "transcoder"
    main_input_name = "inputs"
    # The loss is a mean over the batch; the Trainer divides it under gradient accumulation.
    accepts_loss_kwargs = False
    _keep_in_fp32_modules_strict = ["threshold", "input_mean", "input_scale", "output_mean", "output_scale"]
    _no_split_modules = ["TranscoderModel"]
    model_tags = ["hf_transcoders", "transcoder", "mechanistic-interpretability"]

    def __init__(self, config: TranscoderConfig):
        super().__init__(config)
        # `add_model_tags` appends to this list; the class's own belongs to all dictionaries.
        self.model_tags = list(self.model_tags)
        self.activation = ACTIVATIONS[config.activation]()
        for name, shape in parameter_shapes(config).items():
            self.register_parameter(name, None if shape is None else nn.Parameter(torch.empty(shape)))
        for name, shape in buffer_shapes(config).items():
            self.register_buffer(name, torch.empty(shape))
        self.post_init()

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
        if config.normalization != "none":
            init.zeros_(self.input_mean)
            init.zeros_(self.output_mean)
            init.ones_(self.input_scale)
            init.ones_(self.output_scale)

    # ------------------------------------------------------------------------------------------------ the function

    @property
    def encoder_weight(self) -> torch.Tensor:
        """Encoder rows as used, shape `(num_features, d_in)`: of unit norm in a tied dictionary."""
        return F.normalize(self.W_enc, dim=-1) if self.config.tied else self.W_enc

    @property
    def decoder_weight(self) -> torch.Tensor:
        """Decoder rows as used, shape `(num_features, d_out)`."""
        return self.encoder_weight if self.config.tied else self.W_dec

    def normalize_input(self, inputs: torch.Tensor) -> torch.Tensor:
        """Inputs on the scale and centre that `W_enc` expects."""
        if self.config.normalization != "none":
            inputs = (inputs.float() - self.input_mean) / self.input_scale
        inputs = inputs.to(self.W_enc.dtype)
        return inputs if self.b_pre is None else inputs - self.b_pre

    def normalize_output(self, targets: torch.Tensor) -> torch.Tensor:
        """Targets on the scale in which the loss is computed."""
        if self.config.normalization != "none":
            targets = (targets.float() - self.output_mean) / self.output_scale
        return targets

    def denormalize_output(self, reconstruction: torch.Tensor) -> torch.Tensor:
        """A reconstruction back in the units of the output site."""
        if self.config.normalization != "none":
            reconstruction = reconstruction * self.output_scale + self.output_mean
        return reconstruction

    def pre_activations(self, inputs: torch.Tensor) -> torch.Tensor:
        """`inputs @ W_enc.T + b_enc` for inputs that [`~TranscoderModel.normalize_input`] has seen."""
        return F.linear(inputs, self.encoder_weight, self.b_enc)

    def encode(self, inputs: torch.Tensor) -> torch.Tensor:
        """
        Feature activations.

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
        The reconstruction that feature activations stand for.

        Args:
            features (`torch.Tensor` of shape `(..., num_features)`): Feature activations.
            inputs (`torch.Tensor` of shape `(..., d_in)`, *optional*):
                Activations at the input site; needed by a dictionary with a skip connection.

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
                "give what its own `encode` returns."
            )
        centred = None if self.W_skip is None else self.normalize_input(inputs)
        reconstruction = F.linear(features.to(self.W_enc.dtype), self.decoder_weight.T)
        return self.denormalize_output(self._add_linear_part(reconstruction, centred))

    def _decode_rows(self, encoded: Encoded, inputs: torch.Tensor) -> torch.Tensor:
        """Normalised reconstruction of `(rows, d_in)` normalised inputs."""
        if encoded.dense is not None:
            reconstruction = F.linear(encoded.dense, self.decoder_weight.T)
        else:
            reconstruction = sparse_decode(encoded.offsets, encoded.indices, encoded.values, self.decoder_weight)
        return self._add_linear_part(reconstruction, inputs)

    def _add_linear_part(self, reconstruction, inputs):
        if self.b_dec is not None:
            reconstruction = reconstruction + self.b_dec
        if self.W_skip is not None:
            reconstruction = reconstruction + F.linear(inputs, self.W_skip)
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
                Activations at the output site; with them the loss is computed.
            mask (`torch.BoolTensor` of shape `(...)`, *optional*):
                Tokens that count in the loss. All of them by default.
            dead_features (`torch.LongTensor` of shape `(n_dead,)`, *optional*):
                Features that have not fired for long; the AuxK loss revives them.
            sparsity_scale (`float`, *optional*, defaults to 1.0):
                Factor on L1 and L0 penalties, for their warm-up.
            output_features (`bool`, *optional*, defaults to `True`):
                Whether to return all features densely. Training does without where the activation is sparse; one that
                computes all of them returns them anyway.
            across_processes (`bool`, *optional*, defaults to `False`):
                Whether the batch is one part of a larger one that all processes of a run share. What a loss takes from the
                whole batch (the energy AuxK is measured in, the L0 that `target_l0` aims at) is then averaged over all of
                them, so that the average of their gradients is that of the larger batch.

        Returns:
            [`TranscoderOutput`]
        """
        config = self.config
        self._check_width(inputs, config.d_in, "inputs")
        lead = inputs.shape[:-1]
        rows = self.normalize_input(inputs.reshape(-1, inputs.shape[-1]))
        encoded = self.activation.encode(self, rows)
        normalized = self._decode_rows(encoded, rows)

        loss = losses = None
        if targets is not None:
            self._check_width(targets, config.d_out, "targets")
            self._check_tokens(targets.shape[:-1], lead, "targets")
            if mask is not None:
                self._check_tokens(mask.shape, lead, "mask")
            if not len(rows):
                raise TranscoderError("There are no tokens to take a loss of: give at least one, or no `targets`.")
            flat_targets = self.normalize_output(targets.reshape(-1, targets.shape[-1])).to(torch.float32)
            flat_mask = None if mask is None else mask.reshape(-1)
            losses = self._losses(
                rows, flat_targets, encoded, normalized, flat_mask, dead_features, sparsity_scale, across_processes
            )
            loss = sum(losses.values())

        values, indices, offsets = encoded.values, encoded.indices, encoded.offsets
        if config.activation == "topk":
            values, indices, offsets = values.view(*lead, config.k), indices.view(*lead, config.k), None
        features = None
        if output_features or encoded.dense is not None:
            features = encoded.to_dense(config.num_features).view(*lead, config.num_features)
        return TranscoderOutput(
            loss=loss,
            reconstruction=self.denormalize_output(normalized).view(*lead, config.d_out),
            features=features,
            feature_values=values,
            feature_indices=indices,
            feature_offsets=offsets,
            losses=losses,
        )

    # ------------------------------------------------------------------------------------------------ the loss

    def reconstruction_error(
        self, reconstruction: torch.Tensor, targets: torch.Tensor, mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """
        Scaled squared error of every token, by `config.loss_reduction`.

        Args:
            reconstruction, targets (`torch.Tensor` of shape `(rows, d_out)`): Both normalised.
            mask (`torch.BoolTensor` of shape `(rows,)`, *optional*): Tokens whose variance scales the error.

        Returns:
            `torch.Tensor` of shape `(rows,)`, float32; its mean is the reconstruction loss.
        """
        squared = (reconstruction.float() - targets).square()
        reduction = self.config.loss_reduction
        if reduction == "sum":
            return squared.sum(-1)
        if reduction == "mean":
            return squared.mean(-1)
        if reduction == "target_norm":
            return squared.mean(-1) / targets.norm(dim=-1).clamp(min=1e-8)
        variance = self.config.target_variance
        if variance is None:
            # NaN where there is none, as for one token: nothing says then what a large error is.
            variance, constant = _variance(targets, mask)
            undefined = constant if mask is None else constant & mask.any()
            variance = torch.where(undefined, torch.nan, variance.clamp(min=1e-12))
        return squared.sum(-1) / variance

    def _losses(self, rows, targets, encoded, reconstruction, mask, dead_features, sparsity_scale, across_processes):
        config = self.config
        if config.matryoshka_sizes:
            per_token = self._matryoshka_error(rows, targets, encoded, mask)
        else:
            per_token = self.reconstruction_error(reconstruction, targets, mask)
        losses = {"reconstruction_loss": token_mean(per_token, mask)}
        penalties = self.activation.penalty(self, rows, targets, encoded, mask, across_processes)
        for name, penalty in penalties.items():
            scale = 1.0 if name == "gate_loss" else sparsity_scale
            losses[name] = scale * token_mean(penalty, mask)
        if config.auxk_coefficient and dead_features is not None and dead_features.numel():
            residual = targets - reconstruction.float()
            auxk = self._auxk(rows, residual, dead_features, mask, across_processes)
            losses["auxk_loss"] = token_mean(auxk, mask)
        return losses

    def _matryoshka_error(self, rows, targets, encoded, mask):
        """Mean over the nested dictionaries; each is the one before plus the features of one more group."""
        sizes = self.config.matryoshka_sizes
        reconstruction = self._add_linear_part(torch.zeros_like(targets), rows)
        error = 0.0
        decoder = self.decoder_weight
        for start, end in zip([0, *sizes], sizes, strict=False):
            if encoded.dense is not None:
                reconstruction = reconstruction + F.linear(encoded.dense[:, start:end], decoder[start:end].T)
            else:
                inside = (encoded.indices >= start) & (encoded.indices < end)
                offsets = F.pad(inside.cumsum(0), (1, 0))[encoded.offsets]
                group = sparse_decode(offsets, encoded.indices[inside], encoded.values[inside], decoder)
                reconstruction = reconstruction + group
            error = error + self.reconstruction_error(reconstruction, targets, mask)
        return error / len(sizes)

    def _auxk(self, rows, residual, dead_features, mask, across_processes):
        """
        Squared error of what the top dead features make of the residual, over the residual's own square
        (arXiv 2406.04093, A.2). The residual is a constant here; encoder and decoder of the dead features learn.
        """
        config = self.config
        residual = residual.detach()
        k = min(config.auxk, dead_features.numel())
        # `index_select`, because the backward pass of plain indexing is several times slower on CPU.
        encoder = self.encoder_weight.index_select(0, dead_features)
        decoder = self.decoder_weight.index_select(0, dead_features)
        pre_activations = F.linear(rows, encoder, self.b_enc.index_select(0, dead_features)).float()
        chosen = topk(pre_activations.detach(), k)
        features = torch.zeros_like(pre_activations).scatter(1, chosen, pre_activations.gather(1, chosen).relu())
        error = (residual - F.linear(features.to(decoder.dtype), decoder.T).float()).square().sum(-1)
        energy = token_mean(residual.square().sum(-1), mask, across_processes).clamp(min=1e-12)
        # A handful of dead features cannot explain much: they should not weigh as much as a full set.
        share = min(1.0, dead_features.numel() / config.auxk)
        return config.auxk_coefficient * share * error / energy

    def effective_l1_coefficient(self) -> float | None:
        """
        The L1 coefficient as it would be against a squared error summed over dimensions, the form in which the papers
        write their losses. `None` where it depends on data not yet seen.
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
        Sets what should be measured rather than guessed: normalisation, `b_pre`, `b_enc`, `b_dec` and
        `config.target_variance`. Called once, before training.

        Args:
            inputs (`torch.Tensor` of shape `(tokens, d_in)`): A sample of activations at the input site.
            targets (`torch.Tensor` of shape `(tokens, d_out)`): The same tokens at the output site.

        Returns:
            [`TranscoderModel`]: itself.

        Raises:
            [`TranscoderError`]: the sample is empty, not finite, or the same for every token.
        """
        config = self.config
        inputs, targets = inputs.float(), targets.float()
        if not len(inputs):
            raise TranscoderError("There are no tokens to measure scales and biases on: give thousands.")
        if len(inputs) == 1:
            logger.warning("One token says nothing about scales and variance: everything stays as it is.")
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
        for side, values in (("input", inputs), ("output", targets)):
            if config.normalization == "standardize":
                getattr(self, f"{side}_mean").copy_(values.mean(0))
                getattr(self, f"{side}_scale").copy_(values.std(0).clamp(min=1e-6))
            elif config.normalization == "scale":
                getattr(self, f"{side}_scale").fill_(values.square().mean().sqrt().clamp(min=1e-6))
        targets = self.normalize_output(targets)
        mean_target = targets.mean(0)
        config.target_variance = (targets - mean_target).square().sum(-1).mean().item()
        if self.b_pre is not None:
            self.b_pre.zero_()
            self.b_pre.copy_(self.normalize_input(inputs).mean(0))
        if config.center_encoder:
            centred = -(self.encoder_weight @ self.normalize_input(inputs).mean(0))
            self.activation.shift_(self, centred - self.b_enc)
        if self.b_dec is not None and config.decoder_bias_init == "mean":
            self.b_dec.copy_(mean_target)
        return self

    @torch.no_grad()
    def project_gradient_(self) -> None:
        """Before an optimizer step: removes what would only change the norm of decoder rows kept at unit norm."""
        if self.config.decoder_norm == "unit" and self.W_dec is not None and self.W_dec.grad is not None:
            direction = F.normalize(self.W_dec, dim=-1)
            along = (self.W_dec.grad * direction).sum(-1, keepdim=True)
            self.W_dec.grad.sub_(along * direction)

    @torch.no_grad()
    def constrain_(self) -> None:
        """After an optimizer step: decoder rows back to unit norm, JumpReLU thresholds not below zero."""
        if self.config.decoder_norm == "unit" and self.W_dec is not None:
            self.W_dec.div_(self.W_dec.norm(dim=-1, keepdim=True).clamp(min=1e-8))
        if self.config.activation == "jumprelu":
            self.threshold.clamp_(min=0)

    @torch.no_grad()
    def update_threshold_(
        self, feature_values: torch.Tensor, decay: float = 0.99, across_processes: bool = False
    ) -> None:
        """
        After a training step of a BatchTopK dictionary: moves the inference threshold towards the smallest activation
        that the batch let through.

        Args:
            feature_values (`torch.Tensor` of shape `(n_pairs,)`): `TranscoderOutput.feature_values` of the step.
            decay (`float`, *optional*, defaults to 0.99): Of the moving average.
            across_processes (`bool`, *optional*, defaults to `False`):
                Whether every process has a batch of its own; the threshold moves towards the mean of what they let through.
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
        """Moves input and output normalisation into the weights. The function stays the same."""
        return folding.fold_normalization_(self)

    def fold_pre_bias_(self) -> "TranscoderModel":
        """Moves `b_pre` into `b_enc` (and `b_dec` where there is a skip connection). The function stays the same."""
        return folding.fold_pre_bias_(self)

    def fold_decoder_norm_(self) -> "TranscoderModel":
        """Gives every decoder row norm one and scales its feature instead. The function stays the same."""
        return folding.fold_decoder_norm_(self)

    # ------------------------------------------------------------------------------------------------ files

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        *args,
        push_to_hub: bool = False,
        remote_code: bool = False,
        **kwargs,
    ):
        """
        Saves configuration and weights (safetensors), all of them or none: whenever the process dies, the folder holds
        one whole save, and so does whoever loads from it meanwhile. Arguments as in
        [`~transformers.PreTrainedModel.save_pretrained`], and:

        Args:
            remote_code (`bool`, *optional*, defaults to `False`):
                Whether to put the model's code beside it, for `AutoModel.from_pretrained(..., trust_remote_code=True)`
                where this package is not installed.
            push_to_hub (`bool`, *optional*, defaults to `False`):
                Whether to push it too, with those of `kwargs` that [`~TranscoderModel.push_to_hub`] takes; `repo_id` is
                by default the folder's name.
        """
        # The Transformers API has publishing as a method of the model: these imports point up, so they wait for a call.
        from ..hub.remote_code import write_remote_code
        from ..hub.upload import take_push_arguments

        push_arguments = take_push_arguments(kwargs, save_directory) if push_to_hub else {}
        if not kwargs.get("is_main_process", True):
            return
        # Under FSDP no process holds a whole tensor; offloaded ones are elsewhere.
        held = [(n, t) for n, t in self.state_dict().items() if not t.is_meta and not hasattr(t, "to_local")]
        if broken := [name for name, tensor in held if not all(map(math.isfinite, bounds(tensor)))]:
            logger.warning(
                f"{', '.join(broken)} of the dictionary saved into {save_directory} has NaN or infinite numbers, with which it "
                "cannot be loaded: save one from before."
            )
        # Where code for others lies is a fact of the folder that a dictionary came from, not of the next one.
        self.config.__dict__.pop("auto_map", None)
        # A single file left from an earlier save would be loaded instead of the shards of this one.
        with atomic_directory(save_directory, replacing=WEIGHT_FILES) as partial:
            super().save_pretrained(partial, *args, **kwargs)
            if remote_code:
                write_remote_code(partial)
        if push_to_hub:
            self.push_to_hub(remote_code=remote_code, **push_arguments)

    def push_to_hub(self, repo_id: str, **kwargs):
        """
        Publishes the dictionary with its card. See [`~hf_transcoders.hub.push`] for the arguments: `commit_message`,
        `private`, `token`, `revision`, `create_pr`, `subfolder`, `remote_code` ...

        Args:
            repo_id (`str`): Such as `"me/my-transcoder"`; made if it does not exist.

        Returns:
            [`~huggingface_hub.CommitInfo`]
        """
        # Points up, for the same reason as in `save_pretrained`.
        from ..hub.upload import push

        return push(self, repo_id, **kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, **kwargs):
        """
        Loads a dictionary from a folder or the Hub, as [`~transformers.PreTrainedModel.from_pretrained`] does, and
        refuses files that are damaged or do not fit together before it makes a tensor. Of its own files, only safetensors
        are read.

        Folders, repos and single files (`"owner/name/path/to/file"`) of other libraries are recognized by their files and
        converted: see `docs/formats.md`. What such files leave out is asked for by these arguments:

        Args:
            base_model (`str` or [`~transformers.PreTrainedModel`], *optional*):
                Language model that the dictionary belongs to. The loaded model is needed where the dictionary reads what a
                norm gives before its gain.
            input_site (`str`, *optional*), output_site (`str`, *optional*):
                Where the dictionary reads and writes.
            folded (`bool`, *optional*):
                Whether the dictionary was trained on a model with folded norms and centered weights, the default of
                TransformerLens.
            scaling_factor (`float`, *optional*):
                Factor on the inputs of a SAELens dictionary with `normalize_activations="expected_average_only_in"`.
            layers (`int`, *optional*), width (`int` or `str`, *optional*), l0 (`float` or `str`, *optional*):
                Which one of a repo that holds many, by the names of its folders; of several, the nearest L0.
        """
        if pretrained_model_name_or_path is None:  # A configuration and a `state_dict`, with nothing to read.
            return super().from_pretrained(None, *model_args, **kwargs)
        if kwargs.pop("use_safetensors", None) is False:
            raise TranscoderError("Dictionaries are read from safetensors only: leave `use_safetensors` out.")
        hub = {name: kwargs.pop(name) for name in HUB_ARGUMENTS if name in kwargs}
        files = Files.at(pretrained_model_name_or_path, kwargs.pop("subfolder", ""), **hub)
        # The file that is published for AutoModel knows no formats of other libraries, and lacks this method.
        foreign = cls._open_foreign(files, kwargs) if hasattr(cls, "_open_foreign") else None
        saved = foreign or open_dictionary(files, kwargs.pop("variant", None))
        return cls.from_saved(saved, *model_args, **kwargs)

    @classmethod
    def _open_foreign(cls, files: Files, kwargs: dict) -> SavedDictionary | None:
        """The opened dictionary of another library; `None` where it is one of this library."""
        from .foreign import foreign_folder, open_foreign, refuse_foreign_arguments, take_choice, take_given

        if (found := foreign_folder(files, take_choice(kwargs))) is None:
            refuse_foreign_arguments(kwargs)
            return None
        return open_foreign(*found, take_given(kwargs))

    @classmethod
    def from_saved(cls, saved: SavedDictionary, *model_args, **kwargs):
        """
        Loads a dictionary from its opened files.

        Args:
            saved ([`SavedDictionary`]): The files.
            model_args, kwargs: As for [`~TranscoderModel.from_pretrained`], without those that say where the files are.
        """
        wants_info = kwargs.pop("output_loading_info", False)
        config = cls._config_of(saved, kwargs)
        expect(saved, tensor_shapes(config), any_size=kwargs.get("ignore_mismatched_sizes", False))
        tensors = read_tensors(saved)
        # Without a path, Transformers looks for nothing else: no adapters, no pickles, no other files.
        model, info = super().from_pretrained(
            None, *model_args, config=config, state_dict=tensors, output_loading_info=True, **kwargs
        )
        model.name_or_path = model.config.name_or_path = saved.path
        for name, tensor in model.state_dict().items():
            if tensor.dtype != tensors[name].dtype and not tensor.is_meta:
                check_numbers(saved.place, name, tensor, converted=True)
        _align_(model)
        return (model, info) if wants_info else model

    @classmethod
    def _config_of(cls, saved: SavedDictionary, kwargs: dict) -> TranscoderConfig:
        """The configuration in a dictionary's files, changed by those of `kwargs` that are fields of it, or the one given."""
        config = kwargs.pop("config", None)
        if config is None:
            names = {field.name for field in fields(cls.config_class)} - {"dtype"}
            changes = {name: kwargs.pop(name) for name in list(kwargs) if name in names}
            return cls.config_class.from_dict(saved.fields, **changes)
        if not isinstance(config, PreTrainedConfig):
            return cls.config_class.from_pretrained(config)
        read = getattr(config, "_saved_fields", None)
        # `AutoModel` has read the configuration before the weights were opened: a save may have come in between.
        if read is not None and str(config.name_or_path) == saved.path:
            now = cls.config_class.from_dict(saved.fields)
            if now._saved_fields != read:
                before = cls.config_class.from_dict(read)
                if any(getattr(config, name) != getattr(before, name) for name in cls.config_class.own_fields()):
                    raise TranscoderError(
                        f"{printable(saved.place)} was saved anew after its configuration was read: load it again."
                    )
                return now
        return config

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


def _variance(values: torch.Tensor, mask: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Expected squared distance of rows from their mean, and whether that is zero up to the mean's rounding."""
    variance = token_mean((values - token_mean(values, mask)).square().sum(-1), mask)
    energy = token_mean(values.square().sum(-1), mask)
    return variance, variance <= energy * (8 * torch.finfo(values.dtype).eps) ** 2


@torch.no_grad()
def _align_(model: nn.Module) -> None:
    """
    Moves tensors that were mapped from a file to where torch would have put them. In a file they begin anywhere, and
    matrix products of few rows round differently then (MKL picks another kernel): a loaded dictionary would not
    compute the same bits as the one that was saved.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.device.type == "cpu" and tensor.data_ptr() % _ALIGNMENT:
            tensor.data = tensor.data.clone()
