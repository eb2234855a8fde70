"""The cross-layer transcoder: dictionaries of several layers that reconstruct their outputs together."""

import itertools
from collections.abc import Mapping
from functools import partial
from typing import Self

import torch
from torch import nn

from ...errors import TranscoderError
from ...ops.sparse import sparse_encode_jointly
from ...text.printable import printable
from ..activations import Encoded, token_mean
from ..foreign import open_foreign_cross_layer
from ..modeling_transcoder import TranscoderModel, TranscoderOutput
from ..named_dictionaries import NamedDictionaries, TranscoderSetOutput
from ..saved_files import Files, SavedDictionary
from ..saved_model import SavedModel
from ..set_index import has_index
from .configuration_cross_layer import CrossLayerTranscoderConfig
from .source import CrossLayerSource


_groups = itertools.count()


class CrossLayerTranscoder(NamedDictionaries, SavedModel):
    r"""
    A cross-layer transcoder (CLT): the features of each layer write at the output site of their own layer and at those of
    later layers, so `reconstruction[m] = sum over l <= m of W_dec[l][:, m - l]ᵀ features[l] + b_dec[m]`
    (Ameisen et al. 2025, Circuit Tracing).

    It behaves like a `dict` of its layers, as a [`TranscoderSet`] does, and is used wherever a set is: each layer is a
    dictionary with several output sites. The layers lie in `sources`, each with `W_enc (num_features, d_in)`,
    `b_enc (num_features,)`, `W_dec (num_features, sites, d_out)` and `b_dec (d_out,)`, where `sites` are those that the layer
    writes at, its own first.

    Example:

    ```python
    >>> from hf_transcoders import CrossLayerTranscoder, CrossLayerTranscoderConfig

    >>> config = CrossLayerTranscoderConfig.for_model(base, layers=range(8, 12), num_features=2304, k=32)
    >>> transcoder = CrossLayerTranscoder(config)
    >>> trained_on_top = CrossLayerTranscoder.from_set(TranscoderSet.from_pretrained("runs/set"))
    ```
    """

    config: CrossLayerTranscoderConfig
    config_class = CrossLayerTranscoderConfig
    base_model_prefix = "cross_layer_transcoder"
    main_input_name = "activations"
    accepts_loss_kwargs = False
    _keep_in_fp32_modules_strict = TranscoderModel._keep_in_fp32_modules_strict
    _no_split_modules = ["CrossLayerSource"]
    model_tags = ["hf_transcoders", "transcoder", "cross-layer-transcoder", "mechanistic-interpretability"]

    def __init__(self, config: CrossLayerTranscoderConfig):
        super().__init__(config)
        # `add_model_tags` appends to this list, and the list of the class is shared by all.
        self.model_tags = list(self.model_tags)
        self.sources = nn.ModuleList(CrossLayerSource(config.source(i)) for i in range(config.num_sources))
        group = next(_groups)
        for source in self.sources:
            source.group = group
        self.post_init()

    def _init_weights(self, module):
        if isinstance(module, CrossLayerSource):
            module._init_weights(module)

    @classmethod
    def tensor_shapes(cls, config: CrossLayerTranscoderConfig) -> dict[str, tuple[int, ...]]:
        """The shape of each saved tensor of a cross-layer transcoder."""
        return {
            f"sources.{number}.{name}": shape
            for number in range(config.num_sources)
            for name, shape in CrossLayerSource.tensor_shapes(config.source(number)).items()
        }

    @property
    def layers(self) -> list[CrossLayerSource]:
        """The dictionaries of the layers, from the first up."""
        return list(self.sources)  # pyright: ignore[reportReturnType]

    def named(self) -> dict[str, TranscoderModel]:
        """The dictionaries of the layers by name, such as `layers.8.mlp.cross_layer_transcoder`."""
        return dict(zip(self.config.names, self.layers, strict=True))  # pyright: ignore[reportReturnType]

    # ------------------------------------------------------------------------------------------------ the function

    def forward(
        self,
        activations: Mapping[str, torch.Tensor],
        dead_features: Mapping[str, torch.LongTensor] | None = None,
        sparsity_scale: float = 1.0,
        output_features: bool = True,
        across_processes: bool = False,
    ) -> TranscoderSetOutput:
        """
        Args:
            activations (`Mapping[str, torch.Tensor]`):
                Site -> activations of shape `(..., width)`. Layers whose output site is among them have a loss.
            dead_features (`Mapping[str, torch.LongTensor]`, *optional*):
                Name of a layer -> its dead features for the AuxK loss.
            sparsity_scale (`float`, *optional*, defaults to 1.0): Factor of the sparsity penalties.
            output_features (`bool`, *optional*, defaults to `True`): Whether to return all features densely.
            across_processes (`bool`, *optional*, defaults to `False`): See [`TranscoderModel.forward`].

        Returns:
            [`TranscoderSetOutput`]: `reconstruction` of a layer is that of its output site, by all layers that write there.
        """
        if missing := set(self.config.input_sites) - activations.keys():  # pyright: ignore[reportArgumentType]
            raise TranscoderError(
                f"There are no activations of {', '.join(sorted(missing))}, which this cross-layer transcoder reads: capture "
                "them too."
            )
        lead = activations[self.config.input_sites[0]].shape[:-1]  # pyright: ignore[reportOptionalSubscript]
        rows = []
        for site, source in zip(self.config.input_sites, self.layers, strict=True):  # pyright: ignore[reportArgumentType]
            source._check_width(activations[site], self.config.d_in, "inputs")
            source._check_tokens(activations[site].shape[:-1], lead, f"inputs at {site}")
            rows.append(source.normalize_input(activations[site].reshape(-1, self.config.d_in)))
        encoded = self._encode(rows)
        totals = self._reconstruct(encoded, rows)
        targets = self._targets(activations, lead)
        outputs = {}
        for number, (name, source) in enumerate(zip(self.config.names, self.layers, strict=True)):
            losses = None
            if targets[number] is not None:
                dead = (dead_features or {}).get(name)
                wanted = source.config.auxk_coefficient and dead is not None and dead.numel()
                losses = source.losses_of(
                    rows[number],
                    targets[number],
                    encoded[number],
                    totals[number],
                    self._residuals(number, targets, totals) if wanted else None,
                    None,
                    partial(token_mean, mask=None, across_processes=across_processes),
                    dead,
                    sparsity_scale,
                )
            outputs[name] = TranscoderOutput(
                loss=None if losses is None else sum(losses.values()),
                reconstruction=source.denormalize_output(totals[number]).view(*lead, self.config.d_out),
                losses=losses,
                **source._features_of(encoded[number], lead, output_features),
            )
        losses = [output.loss for output in outputs.values() if output.loss is not None]
        return TranscoderSetOutput(loss=sum(losses) if losses else None, outputs=outputs)

    def _encode(self, rows: list[torch.Tensor]) -> list[Encoded]:
        if not (self.config.batchtopk_scope == "all" and self.training):
            return [source.activation.encode(source, inputs) for source, inputs in zip(self.layers, rows, strict=True)]
        encoders = [(inputs, s.encoder_weight, s.b_enc) for s, inputs in zip(self.layers, rows, strict=True)]
        total = self.config.k * len(rows) * rows[0].shape[0]  # pyright: ignore[reportOperatorIssue]
        return [Encoded(None, *chosen) for chosen in sparse_encode_jointly(encoders, total)]

    def _reconstruct(self, encoded: list[Encoded], rows: list[torch.Tensor]) -> list[torch.Tensor]:
        """Normalized reconstruction `(rows, d_out)` of each output site: the sum of the writes of all layers."""
        totals: list[torch.Tensor | None] = [None] * len(rows)
        for number, (source, features, inputs) in enumerate(zip(self.layers, encoded, rows, strict=True)):
            for later, part in enumerate(source.written(features, inputs).unbind(1), start=number):
                totals[later] = part if totals[later] is None else totals[later] + part  # pyright: ignore[reportOperatorIssue]
        return totals  # pyright: ignore[reportReturnType]

    def _targets(self, activations, lead) -> list[torch.Tensor | None]:
        """Normalized targets `(rows, d_out)` of the output sites that have activations."""
        targets = []
        for source in self.layers:
            given = activations.get(source.config.output_site)
            if given is not None:
                source._check_width(given, self.config.d_out, "targets")
                source._check_tokens(given.shape[:-1], lead, "targets")
                if not given.numel():
                    raise TranscoderError("There are no tokens for a loss: give at least one, or no targets.")
                given = source.normalize_output(given.reshape(-1, given.shape[-1])).float()
            targets.append(given)
        return targets

    def _residuals(self, number, targets, totals) -> torch.Tensor:
        """The error at all sites that a layer writes at, `(rows, sites * d_out)`; nothing where there are no targets."""
        sites = range(number, number + len(self.config.written_sites(number)))
        parts = [
            torch.zeros_like(totals[site], dtype=torch.float32)
            if targets[site] is None
            else targets[site] - totals[site].detach().float()
            for site in sites
        ]
        return torch.cat(parts, dim=1)

    # ------------------------------------------------------------------------------------------------ around training

    @torch.no_grad()
    def share_scales_(self) -> None:
        """After the layers were initialized: tells each of them the scales of the later sites that it writes at."""
        if self.config.normalization == "none":
            return
        own = [source.output_scale[0] for source in self.layers]
        for number, source in enumerate(self.layers):
            for later in range(1, len(source.output_scale)):
                source.output_scale[later].copy_(own[number + later])

    @torch.no_grad()
    def fold_normalization_(self) -> Self:
        """Folds input and output normalization into the weights without changing the function."""
        for source in self.layers:
            source.fold_normalization_()
        self.config.normalization, self.config.target_variances = "none", None
        return self

    def gather_config_(self) -> None:
        """Copies measured values from the configurations of the layers into the configuration of the whole."""
        configs = [source.config for source in self.layers]
        variances = [config.target_variance for config in configs]
        self.config.target_variances = None if None in variances else variances  # pyright: ignore[reportAttributeAccessIssue]
        evaluations = {n: c.evaluation for n, c in zip(self.config.names, configs, strict=True) if c.evaluation}
        self.config.evaluation = evaluations or None
        self.config.training_summary = configs[0].training_summary

    # ------------------------------------------------------------------------------------------------ files

    def _save_files(self, folder, *args, **kwargs) -> None:
        self.gather_config_()
        super()._save_files(folder, *args, **kwargs)

    @classmethod
    def from_saved(cls, saved: SavedDictionary, *model_args, **kwargs) -> Self:
        loaded = super().from_saved(saved, *model_args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        if model.config.normalization != "none":
            for number, source in enumerate(model.layers):
                for later, site in enumerate(source.config.output_sites):
                    its: CrossLayerSource = model.layers[number + later]  # pyright: ignore[reportIndexIssue]
                    if not torch.equal(source.output_scale[later], its.output_scale[0]):
                        raise TranscoderError(
                            f"In {printable(saved.place)} the layers disagree about the scale of {site}: save the cross-layer "
                            "transcoder again."
                        )
        return loaded

    @classmethod
    def _open_foreign(cls, files: Files, kwargs: dict) -> SavedDictionary | None:
        if has_index(files):
            raise TranscoderError(
                f"{printable(files.place)} holds a set of transcoders: load it with TranscoderSet.from_pretrained, and make a "
                "cross-layer transcoder of it with CrossLayerTranscoder.from_set."
            )
        return open_foreign_cross_layer(files, kwargs)

    @classmethod
    def from_set(cls, transcoders: Mapping[str, TranscoderModel], window: int | None = None) -> Self:
        """
        Makes a cross-layer transcoder that computes the same as the transcoders of a set: decoders of later layers are zero.
        The features are the same, so its loss starts where the training of the set has ended.

        Args:
            transcoders ([`TranscoderSet`] or `Mapping[str, TranscoderModel]`):
                One transcoder for each layer, all with the same configuration but for their sites.
            window (`int`, *optional*): Number of later layers that a feature can write at. All by default.

        Returns:
            [`CrossLayerTranscoder`]

        Raises:
            [`TranscoderError`]: the transcoders differ in more than their sites, or have parts that a cross-layer transcoder
                does not support.
        """
        from .from_set import from_set

        return from_set(cls, transcoders, window)
