"""The configuration of one dictionary."""

import copy
import os
from dataclasses import fields
from types import NoneType
from typing import Any, Literal, get_args, get_origin

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig
from transformers.utils import logging

from ..errors import TranscoderError
from ..text.printable import printable
from ..text.strict_json import read_json
from .token_norms import TOKEN_NORMS


logger = logging.get_logger(__name__)

# Incremented when older versions can no longer read files of this version.
FORMAT_VERSION = 1

#: Types of weights.
DTYPES = ("float32", "float64", "bfloat16", "float16")

# Fields that change what transformers loads, or how.
_INSTRUCTIONS = (
    "quantization_config",
    "attn_implementation",
    "experts_implementation",
    "transformers_weights",
    "fusion_config",
    "configuration_files",
)

# Fields that earlier versions did not save, and that do not decide about the function.
_ADDED = ("evaluation", "base_model_weights")

# Copying nested values recurses once per level, and Python allows a thousand levels.
_DEEPEST = 50

# Larger numbers are infinite in the precision of the losses.
_LARGEST_FLOAT32 = 3.4028234663852886e38

Activation = Literal["relu", "topk", "batchtopk", "jumprelu", "gated"]


@strict
class TranscoderConfig(PreTrainedConfig):
    r"""
    The configuration of a [`TranscoderModel`]: one sparse dictionary that reads a language model's activations at
    `input_site` and predicts those at `output_site`. The same site twice makes it a sparse autoencoder (SAE).

    Args:
        d_in (`int`, *optional*, defaults to 768):
            Width of the input activations.
        d_out (`int`, *optional*, defaults to `d_in`):
            Width of the predicted activations.
        num_features (`int`, *optional*, defaults to 16384):
            Number of features (n), the rows of encoder and decoder.
        activation (`str`, *optional*, defaults to `"topk"`):
            `"relu"` (sparse by an L1 penalty), `"topk"` (k features per token), `"batchtopk"` (k on average over a
            batch in training, a threshold afterwards; arXiv 2412.06410), `"jumprelu"` (learned threshold per feature;
            arXiv 2407.14435) or `"gated"` (arXiv 2404.16014).
        k (`int`, *optional*):
            Active features per token; for `"topk"` and `"batchtopk"`, where it defaults to 32.
        skip_connection (`bool`, *optional*, defaults to `False`):
            Adds a linear map from input to output, `W_skip (d_out, d_in)` (arXiv 2501.18823).
        tied (`bool`, *optional*, defaults to `False`):
            Decoder = encoder with rows of unit norm, as in the 2023 sparse autoencoder (arXiv 2309.08600, Eq. 2-3).
        decoder_bias (`bool`, *optional*, defaults to `True`):
            Whether the output has a bias `b_dec`. The 2023 sparse autoencoder has none.
        pre_bias (`bool`, *optional*, defaults to `False`):
            Whether a learned `b_pre (d_in)` is subtracted from the input.
        matryoshka_sizes (`list[int]`, *optional*):
            Prefix lengths, ascending and ending in `num_features`: the reconstruction loss is averaged over the
            dictionaries made of the first so many features (arXiv 2503.17547).
        normalization (`str`, *optional*, defaults to `"none"`):
            Normalization of inputs and outputs: `"none"`, or by buffers measured before training, which fold into the
            weights, `"scale"` (one number per site, so that an activation's expected squared norm is its width) or
            `"standardize"` (mean and standard deviation per dimension), or of each token by its own input, which does
            not fold, `"token_scale"` (divided by its root mean square) or `"token_standardize"` (minus its mean over
            dimensions, divided by their standard deviation). What is divided out of a token's input is multiplied into its
            reconstruction, and losses compare in the normalized units.
        decoder_init (`str`, *optional*):
            `"zero"`, `"transpose"` (of the encoder) or `"random"`. Defaults to `"transpose"` for SAEs and `"zero"` for
            transcoders; `"random"` for transcoders whose decoder rows are kept at unit norm.
        decoder_bias_init (`str`, *optional*, defaults to `"mean"`):
            `"mean"` of the outputs, measured before training, or `"zero"`.
        center_encoder (`bool`, *optional*):
            Whether `b_enc` starts at `-W_enc @ mean(inputs)`, so that features begin centered. Defaults to `True`
            unless a `pre_bias` (which starts at that mean) does the same.
        decoder_norm (`str`, *optional*, defaults to `"free"`):
            `"unit"` keeps every decoder row at norm one in training and removes the gradient along it.
        loss_reduction (`str`, *optional*, defaults to `"normalized"`):
            Scaling of the squared error, which changes the meaning of every coefficient:
            `"normalized"`: summed over dimensions, divided by the targets' total variance (`target_variance`);
            `"mean"`: mean over tokens and dimensions (code of arXiv 2309.08600);
            `"sum"`: summed over dimensions, mean over tokens (Eq. 5 of arXiv 2406.11944, Eq. 4 of arXiv 2309.08600);
            `"target_norm"`: mean over dimensions of the squared error over the target's norm (code of arXiv 2406.11944).
        target_variance (`float`, *optional*):
            Expected squared distance of a target from the mean target, measured before training. Without it, the
            variance of each batch is used.
        l1_coefficient (`float`, *optional*, defaults to 0.0):
            Weight of the L1 penalty (`"relu"`, `"gated"`).
        l1_weighting (`str`, *optional*, defaults to `"decoder_norm"`):
            `"decoder_norm"` weighs each activation with the norm of its decoder row, `"none"` does not.
        l0_coefficient (`float`, *optional*, defaults to 0.0):
            Weight of the L0 penalty (`"jumprelu"`).
        target_l0 (`float`, *optional*):
            Target of the L0 penalty (`"jumprelu"`), which is then `(L0 / target_l0 - 1)²` instead of L0.
        jumprelu_bandwidth (`float`, *optional*, defaults to 0.05):
            Width of the straight-through kernel, in units of the pre-activations.
        threshold_init (`float`, *optional*, defaults to 0.05):
            Initial value of JumpReLU thresholds.
        auxk_coefficient (`float`, *optional*, defaults to 0.03125):
            Weight of the AuxK loss, in which dead features predict what the live ones missed (arXiv 2406.04093, A.2).
        auxk (`int`, *optional*):
            Number of dead features per token in the AuxK loss. Defaults to `d_in // 2`.
        input_site (`str`, *optional*), output_site (`str`, *optional*):
            Sites that the dictionary reads from and writes to, such as `layers.8.mlp.in` and `layers.8.mlp.branch`.
        base_model_name_or_path (`str`, *optional*), base_model_revision (`str`, *optional*), base_model_type (`str`, *optional*):
            Language model the dictionary was trained on.
        base_model_weights (`str`, *optional*):
            Origin of the language model's weights where they are not those of its name, such as those of a quantized copy.
        training_summary (`dict`, *optional*):
            Training data and settings: data, tokens, context length, precision.
        evaluation (`dict`, *optional*):
            Evaluation of the dictionary: `metrics`, `density_histogram` and `protocol`, as [`EvaluationReport.of`] returns
            them, for the model card. Further training sets it to `None`.
    """

    model_type = "transcoder"

    d_in: int = 768
    d_out: int | None = None
    num_features: int = 16384
    activation: Activation = "topk"
    k: int | None = None
    skip_connection: bool = False
    tied: bool = False
    decoder_bias: bool = True
    pre_bias: bool = False
    matryoshka_sizes: list[int] | None = None
    normalization: Literal["none", "scale", "standardize", "token_scale", "token_standardize"] = "none"
    decoder_init: Literal["zero", "transpose", "random"] | None = None
    decoder_bias_init: Literal["mean", "zero"] = "mean"
    center_encoder: bool | None = None
    decoder_norm: Literal["free", "unit"] = "free"
    loss_reduction: Literal["normalized", "mean", "sum", "target_norm"] = "normalized"
    target_variance: float | int | None = None
    l1_coefficient: float | int = 0.0
    l1_weighting: Literal["decoder_norm", "none"] = "decoder_norm"
    l0_coefficient: float | int = 0.0
    target_l0: float | int | None = None
    jumprelu_bandwidth: float | int = 0.05
    threshold_init: float | int = 0.05
    auxk_coefficient: float | int = 0.03125
    auxk: int | None = None
    input_site: str | None = None
    output_site: str | None = None
    base_model_name_or_path: str | None = None
    base_model_revision: str | None = None
    base_model_type: str | None = None
    base_model_weights: str | None = None
    training_summary: dict[str, Any] | None = None
    evaluation: dict[str, Any] | None = None
    format_version: int = FORMAT_VERSION

    def __post_init__(self, **kwargs):
        if self.d_out is None:
            self.d_out = self.d_in
        if self.k is None and self.activation in ("topk", "batchtopk"):
            self.k = 32
        if self.auxk is None:
            self.auxk = max(1, self.d_in // 2)
        if self.decoder_init is None:
            free = "zero" if self.decoder_norm == "free" else "random"
            self.decoder_init = "transpose" if self.is_autoencoder else free
        if self.center_encoder is None:
            self.center_encoder = not self.pre_bias and not self.tied
        super().__post_init__(**kwargs)
        # Checked here, so that the error is the plain sentence; `validate_fields` repeats the checks before a save.
        self.validate_fields()

    @property
    def is_autoencoder(self) -> bool:
        """Whether input and output sites are the same, so that this is an SAE rather than a transcoder."""
        return self.tied or (self.input_site is not None and self.input_site == self.output_site)

    @property
    def output_sites(self) -> tuple[str, ...]:
        """All sites that the dictionary writes at: of this class, at most one."""
        return () if self.output_site is None else (self.output_site,)

    @property
    def has_site_scales(self) -> bool:
        """Whether inputs and outputs are normalized by buffers, the same for all tokens."""
        return self.normalization not in ("none", *TOKEN_NORMS)

    @property
    def is_sparse(self) -> bool:
        """Whether the number of active features is fixed, so that training can use the sparse kernels."""
        return self.activation in ("topk", "batchtopk")

    @classmethod
    def for_model(cls, base_model, input_site, output_site=None, **kwargs) -> "TranscoderConfig":
        """
        Makes the configuration of a dictionary for a language model, with widths and names filled in.

        Args:
            base_model ([`~transformers.PreTrainedModel`] or [`~transformers.PreTrainedConfig`]):
                Language model, plain or wrapped, or its configuration.
            input_site (`str` or [`Site`]):
                Site that the dictionary reads from.
            output_site (`str` or [`Site`], *optional*, defaults to `input_site`):
                Site that the dictionary predicts. By default the dictionary is an SAE.
            kwargs:
                Any other argument of [`TranscoderConfig`]. For a `module:` site whose width is not the hidden size, give
                `d_in` and `d_out`.

        Returns:
            [`TranscoderConfig`]
        """
        cls._refuse_unknown(kwargs)
        facts = facts_of(base_model)
        return cls(input_site=str(input_site), output_site=str(output_site or input_site), **(facts | kwargs))

    @classmethod
    def _refuse_unknown(cls, kwargs) -> None:
        # `PreTrainedConfig` accepts any name, so a misspelled argument would have no effect.
        if unknown := sorted(set(kwargs) - {field.name for field in fields(cls)}):
            raise TranscoderError(
                f"{cls.__name__} has no argument {', '.join(unknown)}: see its documentation for the names."
            )

    @classmethod
    def own_fields(cls) -> list[str]:
        """The names of the fields that are specific to dictionaries."""
        return [field.name for field in fields(cls) if field.name not in cls._general_fields()]

    @classmethod
    def _general_fields(cls) -> set[str]:
        return {field.name for field in fields(PreTrainedConfig)}

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        """
        Makes a configuration from the content of a `config.json`. Unknown fields are left out, and missing fields or fields of
        the wrong type are refused: with a default value the dictionary would compute another function.
        """
        if not isinstance(config_dict, dict):
            raise TranscoderError("config.json must hold an object at its top: save the dictionary again.")
        if config_dict.get("model_type", cls.model_type) != cls.model_type:
            loaders = {"transcoder": "TranscoderModel", "cross_layer_transcoder": "CrossLayerTranscoder"}
            other = str(config_dict["model_type"])
            advice = (
                f"load it with {loaders[other]}.from_pretrained"
                if other in loaders
                else "give the folder or repo of a dictionary"
            )
            raise TranscoderError(
                f"config.json is that of a model of type '{printable(other)[:40]}', not of a '{cls.model_type}': {advice}."
            )
        check_format_version(config_dict.get("format_version", FORMAT_VERSION))
        own = cls.own_fields()
        if lacking := [name for name in own if name not in config_dict and name not in _ADDED]:
            raise TranscoderError(
                f"config.json lacks {', '.join(lacking[:5])}{' ...' if len(lacking) > 5 else ''}, without which the dictionary "
                "would compute another function: save it again, or copy its config.json from the original."
            )
        saved = {name: config_dict[name] for name in own if name in config_dict}
        values = saved | {name: kwargs.pop(name) for name in own if name in kwargs}
        for field in fields(cls):
            if field.name in values and not _fits(values[field.name], field.type):
                raise TranscoderError(
                    f"`{field.name}` in config.json is {printable(repr(values[field.name]))[:60]}, but must be "
                    f"{_words(field.type)}."
                )
            if _is_deeper(values.get(field.name), _DEEPEST):
                raise TranscoderError(
                    f"`{field.name}` in config.json is nested too deeply to be read: remove it, or copy the original "
                    "file."
                )
        # Fields that a new dictionary may leave to defaults, but a saved one must have.
        settled = ["d_out", "auxk", "decoder_init", "center_encoder"]
        settled += ["k"] if values["activation"] in ("topk", "batchtopk") else []
        if guessed := [name for name in settled if values[name] is None]:
            raise TranscoderError(
                f"{', '.join(guessed)} in config.json is null, so the function of the dictionary is not known: save it "
                "again, or copy its config.json from the original."
            )
        dtype = config_dict.get("dtype", config_dict.get("torch_dtype"))
        if dtype is not None:
            if not isinstance(dtype, str) or dtype not in DTYPES:
                raise TranscoderError(
                    f"`dtype` in config.json is {printable(repr(dtype))[:60]}, but must be one of {', '.join(DTYPES)}."
                )
            values["dtype"] = dtype
        for name, kind in (("auto_map", dict[str, str]), ("architectures", list[str])):
            if _fits(config_dict.get(name), kind):
                values[name] = config_dict[name]
        known = {*own, *cls._general_fields(), "model_type", "auto_map", "_name_or_path", "torch_dtype", "use_cache"}
        unknown = sorted(name for name in config_dict if name not in known)
        # A field with the name of a method or property would break the class.
        if harmful := [name for name in unknown if hasattr(cls, name) or name in _INSTRUCTIONS]:
            raise TranscoderError(
                f"config.json has the fields {printable(', '.join(harmful))[:200]}, which no dictionary has: remove them, or copy "
                "the original file."
            )
        if unknown:
            logger.warning(
                f"config.json has fields that dictionaries do not have, and they are left out: "
                f"{printable(', '.join(unknown))[:200]}."
            )
        made = super().from_dict(values, **kwargs)
        config = made[0] if isinstance(made, tuple) else made
        # The fields of the file, so that [`TranscoderModel.from_pretrained`] can check that its weights belong to them.
        config._saved_fields = copy.deepcopy(saved)
        return made

    @classmethod
    def _dict_from_json_file(cls, json_file: str | os.PathLike):
        # The reader of transformers accepts repeated keys, deep nesting and invalid UTF-8.
        return read_json(json_file)

    def to_dict(self) -> dict[str, Any]:
        values = super().to_dict()
        values.pop("_saved_fields", None)
        return values

    def dict_dtype_to_str(self, d: dict[str, Any]) -> None:
        # The method of transformers descends into `training_summary` and `evaluation`, which may have any value under "dtype".
        if d.get("dtype") is not None:
            d["dtype"] = str(d["dtype"]).removeprefix("torch.")

    def validate_fields(self):
        """Checks that the fields are consistent. Called when the configuration is made and before it is saved."""
        self._check_sizes()
        self._check_decoder()
        self._check_matryoshka()
        self._check_penalties()

    def _check_sizes(self):
        for name in ("d_in", "d_out", "num_features", "auxk"):
            if getattr(self, name) < 1:
                raise TranscoderError(f"`{name}` is {getattr(self, name)}; give a number of at least 1.")
        if self.is_sparse and not 1 <= self.k <= self.num_features:
            raise TranscoderError(
                f"k is {self.k} but must lie between 1 and the number of features ({self.num_features}): lower `k` or "
                "raise `num_features`."
            )
        if self.k is not None and not self.is_sparse:
            raise TranscoderError(
                f"`k` has no meaning for activation '{self.activation}': leave it out, or choose 'topk' or 'batchtopk'."
            )
        if self.normalization == "token_standardize" and self.d_in != self.d_out:
            raise TranscoderError(
                f"`normalization='token_standardize'` adds the mean of the input to the output, so it needs d_in = d_out, not "
                f"{self.d_in} and {self.d_out}: choose 'token_scale' or another."
            )
        if self.tied and self.d_in != self.d_out:
            raise TranscoderError(
                f"A tied dictionary needs d_in = d_out, not {self.d_in} and {self.d_out}: set `tied=False`."
            )

    def _check_decoder(self):
        if self.decoder_norm == "unit" and self.decoder_init == "zero" and not self.tied:
            raise TranscoderError(
                "Decoder rows cannot start at zero and be kept at norm one: leave `decoder_init` out, or choose 'random' or "
                "'transpose'."
            )

    def _check_matryoshka(self):
        sizes = self.matryoshka_sizes
        if sizes is not None and (
            sorted(set(sizes)) != sizes or not sizes or sizes[0] < 1 or sizes[-1] != self.num_features
        ):
            raise TranscoderError(
                f"`matryoshka_sizes` is {sizes}: give ascending prefix lengths that end in num_features "
                f"({self.num_features})."
            )

    def _check_penalties(self):
        if self.l1_coefficient and self.activation not in ("relu", "gated"):
            raise TranscoderError(
                f"`l1_coefficient` does nothing for activation '{self.activation}': leave it out, or choose 'relu' or "
                "'gated'."
            )
        if self.l0_coefficient and self.activation != "jumprelu":
            raise TranscoderError(
                f"`l0_coefficient` does nothing for activation '{self.activation}': leave it out, or choose 'jumprelu'."
            )
        if self.target_l0 is not None and not self.l0_coefficient:
            raise TranscoderError(
                "`target_l0` does nothing without an L0 penalty: leave it out, or choose activation 'jumprelu' and give an "
                "`l0_coefficient`."
            )
        for name in ("l1_coefficient", "l0_coefficient", "auxk_coefficient", "threshold_init"):
            if not 0 <= getattr(self, name) <= _LARGEST_FLOAT32:
                raise TranscoderError(f"`{name}` is {str(getattr(self, name))[:40]}; give a number of at least 0.")
        for name, what in (
            ("target_l0", "number of active features"),
            ("jumprelu_bandwidth", "width"),
            ("target_variance", "variance"),
        ):
            value = getattr(self, name)
            if value is not None and not 0 < value <= _LARGEST_FLOAT32:
                raise TranscoderError(f"`{name}` is {str(value)[:40]}; give a positive {what}.")


def check_format_version(version: object) -> None:
    """Refuses a format that this version of the package cannot read."""
    if type(version) is not int or version < 1:
        raise TranscoderError(
            f"`format_version` is {printable(repr(version))[:60]}, but must be a whole number of at least 1: the file is "
            "damaged, so copy or download it again."
        )
    if version > FORMAT_VERSION:
        raise TranscoderError(
            f"This transcoder was written in format {str(version)[:20]}, and this version of hf_transcoders reads up to "
            f"format {FORMAT_VERSION}: upgrade it with `pip install -U hf_transcoders`."
        )


def facts_of(base_model) -> dict[str, Any]:
    """The fields that say which language model a dictionary belongs to, and the widths of its stream.

    Args:
        base_model ([`~transformers.PreTrainedModel`] or [`~transformers.PreTrainedConfig`]):
            Language model, plain or wrapped, or its configuration.
    """
    # Wrappers of PEFT and torch.compile have the configuration of the model; those of data parallelism do not.
    while not hasattr(base_model, "config") and hasattr(base_model, "module"):
        base_model = base_model.module
    base_config = getattr(base_model, "config", base_model)
    width = base_config.get_text_config().hidden_size
    name = base_config.name_or_path or None
    return {
        "d_in": width,
        "d_out": width,
        # A relative path would be another folder, or a repo on the Hub, when the dictionary is loaded elsewhere.
        "base_model_name_or_path": os.path.abspath(name) if name and os.path.isdir(name) else name,
        "base_model_revision": getattr(base_config, "_commit_hash", None),
        "base_model_type": base_config.model_type,
        "base_model_weights": weights_origin(base_config),
    }


def _fits(value: object, kind: object) -> bool:
    """Whether a JSON value has the type of a field; `true` is not a number."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Literal:
        return isinstance(value, str) and value in inner
    if origin is list:
        return isinstance(value, list) and all(_fits(entry, inner[0]) for entry in value)
    if origin is dict:
        return isinstance(value, dict) and all(inner[1] is Any or _fits(entry, inner[1]) for entry in value.values())
    if inner:  # `int | None`
        return any(_fits(value, one) for one in inner)
    return type(value) is kind


def _is_deeper(value: object, levels: int) -> bool:
    """Whether lists and objects are nested more than `levels` levels deep."""
    if not isinstance(value, dict | list):
        return False
    inner = value.values() if isinstance(value, dict) else value
    return levels == 0 or any(_is_deeper(entry, levels - 1) for entry in inner)


def _words(kind: object) -> str:
    """The type of a field in words."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Literal:
        return f"one of {', '.join(map(repr, inner))}"
    if origin in (list, dict):
        of = {int: "whole numbers", str: "texts"}.get(inner[0], "numbers")
        return f"a list of {of}" if origin is list else "an object"
    if inner:
        return " or ".join(_words(one) for one in inner if not (one is int and float in inner))
    return {int: "a whole number", float: "a number", bool: "true or false", str: "a text", NoneType: "null"}[kind]


def weights_origin(base_config: PreTrainedConfig) -> str | None:
    """
    Where the weights of a language model come from if they are not those of its name: the `weights_origin` of its
    configuration, or the method that it is quantized by.
    """
    if (origin := getattr(base_config, "weights_origin", None)) is not None:
        return str(origin)
    quantization = getattr(base_config, "quantization_config", None)
    if quantization is None:
        return None
    fields = quantization if isinstance(quantization, dict) else quantization.to_dict()
    method = fields.get("quant_method")
    return f"a copy quantized by {getattr(method, 'value', method) or 'an unknown method'}"
