"""Where each model family keeps its blocks, norms, attention and MLPs."""

import difflib
from dataclasses import dataclass
from typing import Literal

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..errors import TranscoderError
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
        attention (`str`):
            Attention module of a block.
        attention_norm (`str`):
            Norm before attention.
        mlp (`str` or `tuple[str, str]`):
            MLP module, or the first and last module of an MLP that has no module of its own.
        mlp_norm (`str`):
            Norm before the MLP. With a parallel residual it may be the same as `attention_norm`.
        final_norm (`str`):
            Norm after the last block.
        embeddings (`str`):
            Token embedding.
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
        parallel_residual (`bool` or `str`, *optional*, defaults to `False`):
            Whether attention and MLP both read the block's input; a string names the config attribute that decides.
        pre_norm (`bool` or `str`, *optional*, defaults to `True`):
            Whether the norms come before attention and MLP; a string names the config attribute that decides. Models
            with the norm on the residual stream itself are refused: their blocks do not add to the stream.
        flat_mlp (`bool`, *optional*, defaults to `False`):
            Whether the MLP sees batch and positions as one axis.
    """

    blocks: str
    attention: str
    attention_norm: str
    mlp: str | tuple[str, str]
    mlp_norm: str
    final_norm: str
    embeddings: str
    attention_post_norm: str | None = None
    mlp_post_norm: str | None = None
    position_embeddings: str | None = None
    query: str | None = None
    key: str | None = None
    value: str | None = None
    fused_qkv: str | None = None
    fused_by_head: bool = False
    attention_output: str | None = None
    parallel_residual: bool | str = False
    pre_norm: bool | str = True
    flat_mlp: bool = False


@dataclass(frozen=True)
class Location:
    """A [`Site`] found in a model.

    Args:
        module (`torch.nn.Module`):
            The module whose input or output is the value.
        side (`"in"` or `"out"`):
            Which of the two: its first input, or its output (the first element where that is a tuple).
        block (`torch.nn.Module`, *optional*):
            Set where `module` sees batch and positions as one axis: the block whose input still has both.
    """

    module: nn.Module
    side: Literal["in", "out"]
    block: nn.Module | None = None


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


def _gemma_like(prefix=""):
    # In this family `post_attention_layernorm` comes after attention; in Llama, despite its name, before the MLP.
    return _llama_like(
        prefix,
        mlp_norm="pre_feedforward_layernorm",
        attention_post_norm="post_attention_layernorm",
        mlp_post_norm="post_feedforward_layernorm",
    )


_ARCHITECTURES = {
    "gpt2": Architecture(
        blocks="h",
        attention="attn",
        attention_norm="ln_1",
        mlp="mlp",
        mlp_norm="ln_2",
        final_norm="ln_f",
        embeddings="wte",
        position_embeddings="wpe",
        fused_qkv="c_attn",
        attention_output="c_proj",
    ),
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
    "llama": _llama_like(),
    "mistral": _llama_like(),
    "qwen2": _llama_like(),
    "qwen3": _llama_like(),
    "gemma2": _gemma_like(),
    "gemma3_text": _gemma_like(),
    "gemma3": _gemma_like("language_model."),
    "opt": Architecture(
        blocks="decoder.layers",
        attention="self_attn",
        attention_norm="self_attn_layer_norm",
        mlp=("fc1", "fc2"),
        mlp_norm="final_layer_norm",
        final_norm="decoder.final_layer_norm",
        embeddings="decoder.embed_tokens",
        position_embeddings="decoder.embed_positions",
        query="q_proj",
        key="k_proj",
        value="v_proj",
        attention_output="out_proj",
        pre_norm="do_layer_norm_before",
        flat_mlp=True,
    ),
    "phi": _llama_like(
        mlp_norm="input_layernorm",
        final_norm="final_layernorm",
        attention_output="dense",
        parallel_residual=True,
    ),
    "phi3": _llama_like(query=None, key=None, value=None, fused_qkv="qkv_proj"),
}


def register_architecture(model_type: str, architecture: Architecture):
    """Teach the library the module names of another model family.

    Args:
        model_type (`str`):
            The family's `config.model_type`.
        architecture ([`Architecture`]):
            Its module names; replaces what was known under this `model_type`.

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
        [`TranscoderError`]: the family is not known, or this model of it normalises the residual stream itself.
    """
    model_type = model.config.model_type
    architecture = _ARCHITECTURES.get(model_type)
    if architecture is None:
        raise TranscoderError(
            f"The module names of model type '{model_type}' are not known (known: {', '.join(_ARCHITECTURES)}); call "
            f"`register_architecture('{model_type}', Architecture(...))` once, or use sites of the form "
            "'module:<dotted name>:out', which need no registration."
        )
    if not _decided_by(model, architecture.pre_norm):
        raise TranscoderError(
            f"This {model_type} model normalises the residual stream after each addition "
            f"(`{architecture.pre_norm}=False`), so the points of its blocks do not add up; use sites of the form "
            "'module:<dotted name>:out' instead."
        )
    return architecture


@takes_model
def has_parallel_residual(model: PreTrainedModel) -> bool:
    """Whether attention and MLP of each block both read the block's input."""
    return _decided_by(model, architecture_of(model).parallel_residual)


@takes_model
def num_layers(model: PreTrainedModel) -> int:
    """How many decoder blocks the model has."""
    return len(_blocks(model))


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
        return Location(_named_module(model, site.module), site.point)
    if site.head is not None:
        raise TranscoderError(
            f"'{site}' is inside the attention module, where there is nothing to hook; use `edit_attention` or the "
            "functions of `hf_transcoders.circuits`."
        )

    architecture = architecture_of(model)
    blocks = _blocks(model)
    if site.layer >= len(blocks):
        raise TranscoderError(f"'{site}' does not exist: this model has the layers 0 to {len(blocks) - 1}.")
    if site.point == "resid_mid" and has_parallel_residual(model):
        raise TranscoderError(
            f"'{site}' does not exist: attention and MLP of this model both read the block's input, so there is no "
            "residual stream between them; use resid_pre or resid_post."
        )

    mlp = architecture.mlp
    first, last = (mlp, mlp) if isinstance(mlp, str) else mlp
    name, side = {
        "resid_pre": ("", "in"),
        "attn.in": (architecture.attention, "in"),
        "attn.out": (architecture.attention, "out"),
        "attn.branch": (architecture.attention_post_norm or architecture.attention, "out"),
        "resid_mid": (architecture.mlp_norm, "in"),
        "mlp.in": (first, "in"),
        "mlp.out": (last, "out"),
        "mlp.branch": (architecture.mlp_post_norm or last, "out"),
        "resid_post": ("", "out"),
    }[site.point]
    block = blocks[site.layer]
    flat = architecture.flat_mlp and site.point in ("resid_mid", "mlp.in", "mlp.out", "mlp.branch")
    return Location(block.get_submodule(name), side, block if flat else None)


@takes_model
def site_width(model: PreTrainedModel, site: Site | str) -> int | None:
    """Size of the last dimension of the activation at a site.

    Returns:
        `int`, or `None` where no weight of the module tells it.
    """
    site = Site.parse(site)
    module = locate(model, site).module
    if site.module is None:
        return model.config.get_text_config().hidden_size
    if isinstance(module, nn.Linear):
        return module.in_features if site.point == "in" else module.out_features
    if isinstance(module, Conv1D):
        return module.nx if site.point == "in" else module.nf
    if isinstance(module, nn.Embedding):
        return module.embedding_dim if site.point == "out" else None
    # A norm: a module of one vector, as wide as what it scales.
    weight = dict(module.named_parameters()).get("weight")
    return weight.shape[0] if weight is not None and weight.dim() == 1 else None


def _decided_by(model, flag):
    return getattr(model.config, flag) if isinstance(flag, str) else flag


def _blocks(model):
    return model.base_model.get_submodule(architecture_of(model).blocks)


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
