"""The configurations of a cross-layer transcoder and of the dictionary of one of its layers."""

import re
from typing import Any, Literal

from huggingface_hub.dataclasses import strict

from ...errors import TranscoderError
from ..configuration_transcoder import TranscoderConfig, facts_of
from ..token_norms import TOKEN_NORMS


@strict
class CrossLayerTranscoderConfig(TranscoderConfig):
    r"""
    The configuration of a [`CrossLayerTranscoder`]: one dictionary for each of several layers, whose features write at the
    output site of their own layer and at those of later layers.

    The fields of [`TranscoderConfig`] hold for each layer: `num_features` is the number of features of one layer, and `k`
    the number of active features of one layer and token. These are not supported: `tied`, `pre_bias`,
    `matryoshka_sizes`, `decoder_norm="unit"`, `decoder_bias=False`, and the activation `"gated"`.

    Args:
        input_sites (`list[str]`):
            Sites that the layers read, from the first layer up, such as `layers.0.mlp.in`.
        output_sites (`list[str]`):
            Sites that the layers predict, one for each input site, such as `layers.0.mlp.branch`.
        window (`int`, *optional*):
            Number of later layers of the list that a feature writes at besides its own. All by default; with 0 the layers are
            separate transcoders.
        batchtopk_scope (`str`, *optional*, defaults to `"layer"`):
            Whether BatchTopK chooses among the features of each layer by itself (`"layer"`) or among those of all layers
            (`"all"`), so that layers may have different numbers of active features; `k` is then the mean over layers.
        tanh_coefficient (`float`, *optional*, defaults to 0.0):
            Weight of the penalty `tanh(tanh_scale * activation * decoder norm)`, summed over the features of a token, for
            `"jumprelu"` and `"relu"`. The norm is that of all decoder rows of a feature, one after the other.
        tanh_scale (`float`, *optional*, defaults to 4.0):
            Factor inside of the penalty.
        target_variances (`list[float]`, *optional*):
            `target_variance` of each output site, measured before training.
    """

    model_type = "cross_layer_transcoder"

    input_sites: list[str] | None = None
    output_sites: list[str] | None = None
    window: int | None = None
    batchtopk_scope: Literal["layer", "all"] = "layer"
    tanh_coefficient: float | int = 0.0
    tanh_scale: float | int = 4.0
    target_variances: list[float] | None = None

    @classmethod
    def for_model(  # pyright: ignore[reportIncompatibleMethodOverride]
        cls, base_model, layers=None, reads: str = "mlp.in", writes: str = "mlp.branch", **kwargs
    ) -> "CrossLayerTranscoderConfig":
        """
        Makes the configuration of a cross-layer transcoder for a language model, with widths and names filled in.

        Args:
            base_model ([`~transformers.PreTrainedModel`] or [`~transformers.PreTrainedConfig`]):
                Language model, plain or wrapped, or its configuration.
            layers (`Iterable[int]`, *optional*): Layers, in ascending order. All by default.
            reads (`str`, *optional*, defaults to `"mlp.in"`): Point of each layer that is read.
            writes (`str`, *optional*, defaults to `"mlp.branch"`): Point of each layer that is predicted.
            kwargs: Any other argument of [`CrossLayerTranscoderConfig`].

        Returns:
            [`CrossLayerTranscoderConfig`]
        """
        cls._refuse_unknown(kwargs)
        facts = facts_of(base_model)
        if layers is None:
            config = base_model
            while not hasattr(config, "get_text_config"):
                config = getattr(config, "config", None) or config.module
            layers = range(config.get_text_config().num_hidden_layers)
        layers = list(layers)
        sites = {
            "input_sites": [f"layers.{layer}.{reads}" for layer in layers],
            "output_sites": [f"layers.{layer}.{writes}" for layer in layers],
        }
        return cls(**(facts | sites | kwargs))

    @property
    def num_sources(self) -> int:
        """Number of layers that have features."""
        return len(self.input_sites or ())

    @property
    def names(self) -> list[str]:
        """Names of the dictionaries of the layers, such as `layers.8.mlp.cross_layer_transcoder`."""
        places = [re.sub(r"\.(branch|out)$", "", site.replace(":", ".")) for site in self.output_sites or ()]
        return [f"{place}.cross_layer_transcoder" for place in places]

    def written_sites(self, source: int) -> list[str]:
        """The output sites at which the features of a layer write, its own first.

        Args:
            source (`int`): Number of the layer in `input_sites`.
        """
        assert self.output_sites is not None
        end = None if self.window is None else source + self.window + 1
        return self.output_sites[source:end]

    def source(self, number: int) -> "CrossLayerSourceConfig":
        """The configuration of the dictionary of one layer.

        Args:
            number (`int`): Number of the layer in `input_sites`.
        """
        assert self.input_sites is not None
        own, *later = self.written_sites(number)
        fields = {name: getattr(self, name) for name in TranscoderConfig.own_fields()}
        fields |= {
            "input_site": self.input_sites[number],
            "output_site": own,
            "later_sites": later,
            "target_variance": None if self.target_variances is None else self.target_variances[number],
            "evaluation": (self.evaluation or {}).get(self.names[number]),
            **{name: getattr(self, name) for name in ("batchtopk_scope", "tanh_coefficient", "tanh_scale")},
        }
        return CrossLayerSourceConfig(**fields)

    def validate_fields(self):
        self._check_places()
        self._check_unsupported()
        super().validate_fields()

    def _check_places(self):
        reads, writes = self.input_sites or [], self.output_sites or []
        if not reads or len(reads) != len(writes):
            raise TranscoderError(
                f"A cross-layer transcoder needs one output site for each input site, and these are {len(reads)} and "
                f"{len(writes)}: set `input_sites` and `output_sites`, or use CrossLayerTranscoderConfig.for_model."
            )
        for sites, field in ((reads, "input_sites"), (writes, "output_sites")):
            layers = [re.match(r"layers\.(\d+)\.", site) for site in sites]
            known = [int(found[1]) for found in layers if found]
            if len(set(sites)) < len(sites) or known != sorted(set(known)):
                raise TranscoderError(
                    f"`{field}` must name each layer once, from the first up, and is {', '.join(sites)[:200]}: sort it."
                )
        if both := set(reads) & set(writes):
            raise TranscoderError(
                f"'{min(both)}' is both read and written, and a cross-layer transcoder predicts other sites than it reads: "
                "choose other sites, such as mlp.in and mlp.branch."
            )
        if self.input_site is not None or self.output_site is not None:
            raise TranscoderError(
                "A cross-layer transcoder has several sites: give `input_sites` and `output_sites` instead of `input_site` and "
                "`output_site`."
            )
        if self.window is not None and self.window < 0:
            raise TranscoderError(f"`window` is {self.window}; give 0 or more later layers, or leave it out for all.")
        if self.target_variance is not None:
            raise TranscoderError("Each output site has its own variance: give `target_variances`.")
        if self.target_variances is not None and (
            len(self.target_variances) != len(reads) or not all(value > 0 for value in self.target_variances)
        ):
            raise TranscoderError(
                f"`target_variances` must hold one positive number for each of the {len(reads)} output sites."
            )

    def _check_unsupported(self):
        standard = {"tied": False, "pre_bias": False, "matryoshka_sizes": None, "decoder_norm": "free"}
        standard["decoder_bias"] = True
        for name, value in standard.items():
            if getattr(self, name) != value:
                raise TranscoderError(
                    f"`{name}={getattr(self, name)!r}` is not supported in a cross-layer transcoder: leave it out."
                )
        unsupported = {
            "activation": self.activation == "gated",
            "decoder_init": self.decoder_init == "transpose",
            "normalization": self.normalization in TOKEN_NORMS,
        }
        for field in (name for name, is_set in unsupported.items() if is_set):
            raise TranscoderError(
                f"`{field}={getattr(self, field)!r}` is not supported in a cross-layer transcoder: choose another."
            )
        if self.batchtopk_scope == "all" and self.activation != "batchtopk":
            raise TranscoderError(
                f"`batchtopk_scope='all'` does nothing for activation '{self.activation}': leave it out, or choose 'batchtopk'."
            )

    def _check_penalties(self):
        super()._check_penalties()
        if self.tanh_coefficient and self.activation not in ("relu", "jumprelu"):
            raise TranscoderError(
                f"`tanh_coefficient` does nothing for activation '{self.activation}': leave it out, or choose 'relu' or "
                "'jumprelu'."
            )
        if not 0 <= self.tanh_coefficient < float("inf") or not 0 < self.tanh_scale < float("inf"):
            raise TranscoderError(
                f"`tanh_coefficient` is {self.tanh_coefficient} and `tanh_scale` {self.tanh_scale}; give numbers of at least 0 "
                "and above 0."
            )


@strict
class CrossLayerSourceConfig(TranscoderConfig):
    """
    The configuration of the dictionary of one layer of a [`CrossLayerTranscoder`]: `output_site` is that of its own layer.

    Args:
        later_sites (`list[str]`, *optional*): Output sites of later layers at which it writes too.
        batchtopk_scope, tanh_coefficient, tanh_scale: Same as in [`CrossLayerTranscoderConfig`].
    """

    model_type = "cross_layer_source"

    later_sites: list[str] | None = None
    batchtopk_scope: Literal["layer", "all"] = "layer"
    tanh_coefficient: float | int = 0.0
    tanh_scale: float | int = 4.0

    @property
    def output_sites(self) -> tuple[str, ...]:
        """All sites that the dictionary writes at, that of its own layer first."""
        return (*super().output_sites, *(self.later_sites or ()))

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs):
        raise TranscoderError(
            "One layer of a cross-layer transcoder has no separate files: load the whole with "
            "CrossLayerTranscoder.from_pretrained."
        )
