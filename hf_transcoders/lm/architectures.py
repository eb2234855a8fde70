"""Names of the blocks, norms, attention and MLP modules of each model family."""

import difflib
from collections.abc import Callable
from dataclasses import dataclass

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from ..errors import TranscoderError
from .hooks import Location
from .linear_maps import acting_module, embedding_width, is_embedding, is_linear, map_size
from .sites import Site
from .wrappers import takes_model


@dataclass(frozen=True)
class Architecture:
    """The module names of one model family.

    `blocks`, `final_norm`, `embeddings` and `position_embeddings` are relative to the base model (what `AutoModel`
    returns); `query`, `key`, `value`, `fused_qkv` and `attention_output` to the attention module; all others to a
    block.

    Args:
        blocks (`str`):
            The list of decoder blocks.
        attention (`str` or `tuple[str, str]`):
            Attention module of a block; or that and the module inside it whose output is what attention computes, where
            the attention module itself returns it with the residual stream added.
        attention_norm (`str` or `None`):
            Norm before attention; `None` where attention reads the residual stream as it is.
        mlp (`str` or `tuple[str, str]`):
            MLP module (of a sparse block all of it, router and experts); or the first and last module of an MLP that has
            no module of its own, or returns its output with the residual stream added.
        mlp_norm (`str` or `None`):
            Norm before the MLP, or `None`. With a parallel residual it may be the same as `attention_norm`.
        final_norm (`str`):
            Norm after the last block.
        embeddings (`str` or `tuple[str, ...]`):
            Token embedding; or that and the modules that its output goes through on its way to the first block.
        attention_post_norm (`str`, *optional*):
            Norm between the attention module and the residual stream.
        mlp_post_norm (`str`, *optional*):
            Norm between the MLP and the residual stream.
        position_embeddings (`str`, *optional*):
            Embedding of absolute positions that is added to the token embedding.
        query, key, value (`str`, *optional*):
            The three projections, where they are separate.
        fused_qkv (`str`, *optional*):
            The one projection that computes all three.
        fused_by_head (`bool`, *optional*, defaults to `False`):
            Whether its outputs are those of one head after the other, instead of all queries, all keys, all values.
        attention_output (`str`, *optional*):
            The projection from the heads back to the hidden size.
        embedding_multiplier (`float`, *optional*, defaults to 1.0):
            Factor on token embeddings before the first block.
        residual_multiplier (`float`, *optional*, defaults to 1.0):
            Factor on the outputs of attention and MLP before they are added to the residual stream.
        logit_multiplier (`float`, *optional*, defaults to 1.0):
            Factor on the output of the unembedding.
        parallel_residual (`bool` or `str`, *optional*, defaults to `False`):
            Whether attention and MLP both read the block's input; a string names the config attribute that decides.
        pre_norm (`bool` or `str`, *optional*, defaults to `True`):
            Whether the norms come before attention and MLP; a string names the config attribute that decides. Models
            with the norm on the residual stream itself are refused: their blocks do not add to the stream.
        flat_mlp (`bool`, *optional*, defaults to `False`):
            Whether the MLP sees batch and positions as one axis.
        adds_in_place (`bool`, *optional*, defaults to `False`):
            Whether a block adds to the outputs of its modules in place, so that what was read there has to be copied.
    """

    blocks: str
    attention: str | tuple[str, str]
    attention_norm: str | None
    mlp: str | tuple[str, str]
    mlp_norm: str | None
    final_norm: str
    embeddings: str | tuple[str, ...]
    attention_post_norm: str | None = None
    mlp_post_norm: str | None = None
    position_embeddings: str | None = None
    query: str | None = None
    key: str | None = None
    value: str | None = None
    fused_qkv: str | None = None
    fused_by_head: bool = False
    attention_output: str | None = None
    embedding_multiplier: float = 1.0
    residual_multiplier: float = 1.0
    logit_multiplier: float = 1.0
    parallel_residual: bool | str = False
    pre_norm: bool | str = True
    flat_mlp: bool = False
    adds_in_place: bool = False


def _llama_like(prefix="", **changes):
    names = {
        "blocks": f"{prefix}layers",
        "attention": "self_attn",
        "attention_norm": "input_layernorm",
        "mlp": "mlp",
        "mlp_norm": "post_attention_layernorm",
        "final_norm": f"{prefix}norm",
        "embeddings": f"{prefix}embed_tokens",
        "query": "q_proj",
        "key": "k_proj",
        "value": "v_proj",
        "attention_output": "o_proj",
    }
    return Architecture(**{**names, **changes})


def _gpt2_like(**changes):
    names = {
        "blocks": "h",
        "attention": "attn",
        "attention_norm": "ln_1",
        "mlp": "mlp",
        "mlp_norm": "ln_2",
        "final_norm": "ln_f",
        "embeddings": "wte",
    }
    return Architecture(**{**names, **changes})


def _opt_like(prefix="", **changes):
    names = {
        "blocks": f"{prefix}layers",
        "attention": "self_attn",
        "attention_norm": "self_attn_layer_norm",
        "mlp": ("fc1", "fc2"),
        "mlp_norm": "final_layer_norm",
        "final_norm": f"{prefix}layer_norm",
        "embeddings": f"{prefix}embed_tokens",
        "position_embeddings": f"{prefix}embed_positions",
        "query": "q_proj",
        "key": "k_proj",
        "value": "v_proj",
        "attention_output": "out_proj",
    }
    return Architecture(**{**names, **changes})


def _gemma_like(prefix=""):
    # In this family `post_attention_layernorm` comes after attention; in Llama, despite its name, before the MLP.
    return _llama_like(
        prefix,
        mlp_norm="pre_feedforward_layernorm",
        attention_post_norm="post_attention_layernorm",
        mlp_post_norm="post_feedforward_layernorm",
    )


def _cohere_like(config):
    return _llama_like(mlp_norm="input_layernorm", parallel_residual=True, logit_multiplier=config.logit_scale)


def _granite_like(config, mlp="mlp"):
    return _llama_like(
        mlp=mlp,
        embedding_multiplier=config.embedding_multiplier,
        residual_multiplier=config.residual_multiplier,
        logit_multiplier=1 / config.logits_scaling,
    )


def _gpt_bigcode(config):
    return _gpt2_like(
        position_embeddings="wpe",
        fused_qkv="c_attn",
        fused_by_head=not config.multi_query,
        attention_output="c_proj",
    )


def _stablelm(config):
    parallel = config.use_parallel_residual
    return _llama_like(
        mlp_norm="input_layernorm" if parallel else "post_attention_layernorm", parallel_residual=parallel
    )


def _bloom(config):
    # Attention and MLP add the stream themselves: their last projections give what is added.
    return Architecture(
        blocks="h",
        attention=("self_attention", "self_attention.dense"),
        attention_norm="input_layernorm",
        mlp=("mlp", "mlp.dense_4h_to_h"),
        mlp_norm="post_attention_layernorm",
        final_norm="ln_f",
        embeddings=("word_embeddings", "word_embeddings_layernorm"),
        pre_norm=not config.apply_residual_connection_post_layernorm,
    )


def _falcon(config):
    parallel = config.new_decoder_architecture or config.parallel_attn
    two = config.new_decoder_architecture and config.num_ln_in_parallel_attn in (None, 2)
    return Architecture(
        blocks="h",
        attention="self_attention",
        attention_norm="ln_attn" if two else "input_layernorm",
        mlp="mlp",
        mlp_norm="ln_mlp" if two else "input_layernorm" if parallel else "post_attention_layernorm",
        final_norm="ln_f",
        embeddings="word_embeddings",
        parallel_residual=parallel,
        adds_in_place=parallel,
    )


# One projection of all three, or, as in latent attention, none of what attention reads: heads then have no linear maps.
_NO_SINGLE_PROJECTIONS = {"query": None, "key": None, "value": None}
_OLMO2 = _llama_like(
    attention_norm=None,
    mlp_norm=None,
    attention_post_norm="post_attention_layernorm",
    mlp_post_norm="post_feedforward_layernorm",
)

_ARCHITECTURES = {
    "gpt2": _gpt2_like(position_embeddings="wpe", fused_qkv="c_attn", attention_output="c_proj"),
    "gpt_neo": _gpt2_like(position_embeddings="wpe"),
    "gptj": _gpt2_like(mlp_norm="ln_1", parallel_residual=True),
    "codegen": _gpt2_like(mlp_norm="ln_1", parallel_residual=True),
    "gpt_bigcode": _gpt_bigcode,
    "gpt_neox": Architecture(
        blocks="layers",
        attention="attention",
        attention_norm="input_layernorm",
        mlp="mlp",
        mlp_norm="post_attention_layernorm",
        final_norm="final_layer_norm",
        embeddings="embed_in",
        fused_qkv="query_key_value",
        fused_by_head=True,
        attention_output="dense",
        parallel_residual="use_parallel_residual",
    ),
    "bloom": _bloom,
    "falcon": _falcon,
    "mpt": Architecture(
        blocks="blocks",
        attention="attn",
        attention_norm="norm_1",
        mlp=("ffn", "ffn.down_proj"),
        mlp_norm="norm_2",
        final_norm="norm_f",
        embeddings="wte",
    ),
    "opt": _opt_like("decoder.", final_norm="decoder.final_layer_norm", pre_norm="do_layer_norm_before", flat_mlp=True),
    "biogpt": _opt_like(),
    "xglm": _opt_like(),
    **dict.fromkeys(
        (
            "llama", "arcee", "cwm", "ernie4_5", "gemma", "glm", "helium", "hunyuan_v1_dense", "ministral", "ministral3",
            "mistral", "nemotron", "olmo", "qwen2", "qwen3", "seed_oss", "smollm3", "starcoder2",
            "ernie4_5_moe", "glm4_moe", "gpt_oss", "mixtral", "olmoe", "phimoe", "qwen2_moe", "qwen3_moe",
        ),
        _llama_like(),
    ),
    "apertus": _llama_like(attention_norm="attention_layernorm", mlp_norm="feedforward_layernorm"),
    "cohere": _cohere_like,
    "cohere2": _cohere_like,
    "dbrx": Architecture(
        blocks="blocks",
        attention="norm_attn_norm.attn",
        attention_norm="norm_attn_norm.norm_1",
        mlp="ffn",
        mlp_norm="norm_attn_norm.norm_2",
        final_norm="norm_f",
        embeddings="wte",
        fused_qkv="Wqkv",
        attention_output="out_proj",
    ),
    "deepseek_v2": _llama_like(**_NO_SINGLE_PROJECTIONS),
    "deepseek_v3": _llama_like(**_NO_SINGLE_PROJECTIONS),
    "exaone4": _OLMO2,
    "gemma2": _gemma_like(),
    "gemma3_text": _gemma_like(),
    "gemma3": _gemma_like("language_model."),
    "glm4": _llama_like(attention_post_norm="post_self_attn_layernorm", mlp_post_norm="post_mlp_layernorm"),
    "granite": _granite_like,
    "granitemoe": lambda config: _granite_like(config, mlp="block_sparse_moe"),
    "olmo2": _OLMO2,
    "olmo3": _OLMO2,
    "persimmon": _llama_like(
        final_norm="final_layernorm",
        fused_qkv="query_key_value",
        fused_by_head=True,
        attention_output="dense",
        **_NO_SINGLE_PROJECTIONS,
    ),
    "phi": _llama_like(
        mlp_norm="input_layernorm",
        final_norm="final_layernorm",
        attention_output="dense",
        parallel_residual=True,
    ),
    "phi3": _llama_like(fused_qkv="qkv_proj", **_NO_SINGLE_PROJECTIONS),
    "stablelm": _stablelm,
    "vaultgemma": _llama_like(mlp_norm="pre_feedforward_layernorm"),
}  # fmt: skip


def register_architecture(model_type: str, architecture: Architecture | Callable[[PretrainedConfig], Architecture]):
    """Teach the library the module names of another model family.

    Args:
        model_type (`str`):
            The family's `config.model_type`.
        architecture ([`Architecture`] or `Callable`):
            Its module names, or a function that tells them from the model's text config; replaces what was known under
            this `model_type`.

    Example:

    ```python
    >>> register_architecture("olmo", Architecture(blocks="layers", attention="self_attn", ...))
    ```
    """
    _ARCHITECTURES[model_type] = architecture


@takes_model
def architecture_of(model: PreTrainedModel) -> Architecture:
    """The [`Architecture`] of a causal language model or of its base model.

    Raises:
        [`TranscoderError`]: the family is not known, or this model of it normalizes the residual stream itself.
    """
    model_type = model.config.model_type
    architecture = _ARCHITECTURES.get(model_type)
    if architecture is None:
        raise TranscoderError(
            f"The module names of model type '{model_type}' are not known, so its layers, heads and residual stream cannot be "
            f"found (known: {', '.join(sorted(_ARCHITECTURES))}): call `register_architecture('{model_type}', "
            "Architecture(...))` once; to train, evaluate and splice in dictionaries alone, sites of the form "
            "'module:<dotted name>:out' need no registration."
        )
    if not isinstance(architecture, Architecture):
        architecture = architecture(model.config.get_text_config())
    if not _decided_by(model, architecture.pre_norm):
        raise TranscoderError(
            f"This {model_type} model normalizes the residual stream itself"
            f"{f' (`{architecture.pre_norm}=False`)' if isinstance(architecture.pre_norm, str) else ''}, so the points of "
            "its blocks do not add up; use sites of the form 'module:<dotted name>:out' instead."
        )
    return architecture


@takes_model
def is_registered(model: PreTrainedModel) -> bool:
    """Whether the module names of the model's family are known."""
    return model.config.model_type in _ARCHITECTURES


@takes_model
def has_parallel_residual(model: PreTrainedModel) -> bool:
    """Whether attention and MLP of each block both read the block's input."""
    return _decided_by(model, architecture_of(model).parallel_residual)


@takes_model
def num_layers(model: PreTrainedModel) -> int:
    """Number of decoder blocks of the model."""
    return len(decoder_blocks(model))


@takes_model
def decoder_blocks(model: PreTrainedModel) -> nn.ModuleList:
    """The decoder blocks of the model, from the first up."""
    return _submodule(model, model.base_model, architecture_of(model).blocks)


@takes_model
def final_norm(model: PreTrainedModel) -> nn.Module:
    """The norm after the last block."""
    return _submodule(model, model.base_model, architecture_of(model).final_norm)


@takes_model
def locate(model: PreTrainedModel, site: Site | str) -> Location:
    """Find the module at a site, and whether its input or its output is the value there.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            A causal language model or its base model.
        site ([`Site`] or `str`):
            The place to find.

    Returns:
        [`Location`]

    Raises:
        [`TranscoderError`]: the model has no such layer, module or point, or its family is not known.
    """
    site = Site.parse(site)
    if site.module is not None:
        # An unknown model may change its tensors in place later.
        return Location(_named_module(model, site.module), site.point, model.get_decoder(), copied=True)
    if site.head is not None:
        raise TranscoderError(
            f"'{site}' is inside the attention module, where there is nothing to hook; use `edit_attention` or the "
            "functions of `hf_transcoders.circuits`."
        )

    architecture = architecture_of(model)
    blocks = decoder_blocks(model)
    if site.layer >= len(blocks):
        raise TranscoderError(f"'{site}' does not exist: this model has the layers 0 to {len(blocks) - 1}.")
    if site.point == "resid_mid" and _decided_by(model, architecture.parallel_residual):
        raise TranscoderError(
            f"'{site}' does not exist: attention and MLP of this model both read the block's input, so there is no "
            "residual stream between them; use resid_pre or resid_post."
        )

    attention, attention_end = _ends(architecture.attention)
    mlp, mlp_end = _ends(architecture.mlp)
    name, side = {
        "resid_pre": ("", "in"),
        "attn.in": (attention, "in"),
        "attn.out": (attention_end, "out"),
        "attn.branch": (architecture.attention_post_norm or attention_end, "out"),
        "resid_mid": (architecture.mlp_norm or mlp, "in"),
        "mlp.in": (mlp, "in"),
        "mlp.out": (mlp_end, "out"),
        "mlp.branch": (architecture.mlp_post_norm or mlp_end, "out"),
        "resid_post": ("", "out"),
    }[site.point]
    block = blocks[site.layer]
    flat = architecture.flat_mlp and site.point in ("resid_mid", "mlp.in", "mlp.out", "mlp.branch")
    return Location(
        _submodule(model, block, name),
        side,
        block if flat else None,
        architecture.residual_multiplier if site.point in ("attn.branch", "mlp.branch") else 1.0,
        architecture.adds_in_place and side == "out",
    )


@takes_model
def site_width(model: PreTrainedModel, site: Site | str) -> int | None:
    """Size of the last dimension of the activation at a site.

    Returns:
        `int`, or `None` where no weight of the module tells it.

    Raises:
        [`TranscoderError`]: the model does not have the site; see [`locate`].
    """
    site = Site.parse(site)
    return width_at(model, site, locate(model, site))


def width_at(model: PreTrainedModel, site: Site, location: Location) -> int | None:
    """The [`site_width`] of a site that was located before."""
    if site.module is None:
        return model.config.get_text_config().hidden_size
    module = location.module
    if is_linear(module):
        outputs, inputs = map_size(module)
        return inputs if site.point == "in" else outputs
    if is_embedding(module):
        return embedding_width(module) if site.point == "out" else None
    # A norm: a module of one vector, as wide as what it scales.
    weight = dict(acting_module(module).named_parameters()).get("weight")
    return weight.shape[0] if weight is not None and weight.dim() == 1 else None


def _ends(names):
    """First and last module of an entry of an [`Architecture`] that names one module or two."""
    return (names, names) if isinstance(names, str) else names


def _decided_by(model, flag):
    return getattr(model.config, flag) if isinstance(flag, str) else flag


def _submodule(model, parent, name):
    try:
        return parent.get_submodule(name)
    except AttributeError as error:
        raise TranscoderError(
            f"The architecture that is registered for model type '{model.config.model_type}' names '{name}', which "
            f"{type(parent).__name__} does not have: register it with the names that `named_modules()` gives."
        ) from error


def _named_module(model, path):
    # A site written for the causal LM also names its place in the base model alone, and the other way round.
    prefix = model.base_model_prefix + "."
    modules = dict(model.named_modules())
    for name in (path, prefix + path, path.removeprefix(prefix)):
        if name in modules:
            return modules[name]
    nearest = difflib.get_close_matches(path, modules, n=1)
    hint = f" Did you mean '{nearest[0]}'?" if nearest else ""
    raise TranscoderError(f"{type(model).__name__} has no module '{path}'.{hint}")
