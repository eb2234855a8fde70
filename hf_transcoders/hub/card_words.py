"""What a model card says of sites, sizes and versions: from plain values to words."""

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from huggingface_hub.utils import HFValidationError, validate_repo_id

from ..lm import Site
from ..markdown import Markdown, code, escape
from ..models import TranscoderConfig, TranscoderModel


PLACES = {
    "resid_pre": "the residual stream entering layer {}",
    "attn.in": "the input of layer {}'s attention, after its norm",
    "attn.out": "the output of layer {}'s attention module",
    "attn.branch": "what layer {}'s attention adds to the residual stream",
    "resid_mid": "the residual stream of layer {} between attention and MLP",
    "mlp.in": "the input of layer {}'s MLP, after its norm",
    "mlp.out": "the output of layer {}'s MLP module",
    "mlp.branch": "what layer {}'s MLP adds to the residual stream",
    "resid_post": "the residual stream leaving layer {}",
}
NORMALIZATIONS = {
    "none": "none",
    "scale": "one factor for each site, measured before training and kept with the weights",
    "standardize": "mean and standard deviation of each dimension, measured before training and kept with the weights",
}
LOSSES = {
    "normalized": "squared error, summed over dimensions, over the targets' variance",
    "mean": "squared error, mean over tokens and dimensions",
    "sum": "squared error, summed over dimensions, mean over tokens",
    "target_norm": "squared error, mean over dimensions, over the target's norm",
}
#: What a dictionary is made of -> the paper to cite for it.
PAPERS = {
    "transcoder": "transcoders: [arXiv 2406.11944](https://arxiv.org/abs/2406.11944)",
    "skip": "skip transcoders: [arXiv 2501.18823](https://arxiv.org/abs/2501.18823)",
    "sae": "sparse autoencoders: [arXiv 2309.08600](https://arxiv.org/abs/2309.08600)",
    "topk": "TopK and AuxK: [arXiv 2406.04093](https://arxiv.org/abs/2406.04093)",
    "batchtopk": "BatchTopK: [arXiv 2412.06410](https://arxiv.org/abs/2412.06410)",
    "jumprelu": "JumpReLU: [arXiv 2407.14435](https://arxiv.org/abs/2407.14435)",
    "gated": "gated dictionaries: [arXiv 2404.16014](https://arxiv.org/abs/2404.16014)",
    "matryoshka": "Matryoshka dictionaries: [arXiv 2503.17547](https://arxiv.org/abs/2503.17547)",
}


def kind(config: TranscoderConfig) -> str:
    """What kind of dictionary this is."""
    if config.is_autoencoder:
        return "SAE"
    return "skip transcoder" if config.skip_connection else "transcoder"


def place(site: str | None) -> Markdown:
    """A site in words."""
    if site is None:
        return Markdown("activations of a place that was not recorded")
    site = Site.parse(site)
    if site.module is not None:
        return Markdown(f"the {'input' if site.point == 'in' else 'output'} of the module {code(site.module)}")
    return Markdown(PLACES[site.point].format(site.layer))


def place_and_name(site: str | None) -> Markdown:
    return Markdown(f"{place(site)} ({code(site)})") if site else place(site)


def site_and_width(site: str | None, width: int) -> Markdown:
    return Markdown(f"{code(site) + ', ' if site else ''}{width} wide")


def dtype_name(dictionary: TranscoderModel) -> str:
    return str(dictionary.dtype).removeprefix("torch.")


def formula(config: TranscoderConfig) -> str:
    """What the dictionary computes, one step a line."""
    lines = []
    scaled = config.normalization != "none"
    x = "input"
    if scaled:
        lines.append("x        = (input - input_mean) / input_scale")
        x = "x"
    if config.pre_bias:
        lines.append(f"x        = {x} - b_pre")
        x = "x"
    products = f"W_enc {x} + b_enc"
    lines.append(
        {
            "relu": f"features = relu({products})",
            "topk": f"features = relu(the {config.k} largest of {products})",
            "batchtopk": f"features = {products} where above one threshold, else 0",
            "jumprelu": f"features = {products} where above each feature's threshold, else 0",
            "gated": f"features = relu(exp(r_mag) * W_enc {x} + b_mag) where {products} > 0, else 0",
        }[config.activation]
    )
    output = "W_dec^T features"
    if config.decoder_bias:
        output += " + b_dec"
    if config.skip_connection:
        output += f" + W_skip {x}"
    lines.append(f"output   = {output}" if not scaled else f"output   = ({output}) * output_scale + output_mean")
    if config.tied:
        lines.append("W_dec    = W_enc, with rows of unit norm")
    return "\n".join(lines)


def sparsity(config: TranscoderConfig) -> str:
    return {
        "relu": f"ReLU, L1 coefficient {config.l1_coefficient:g}",
        "topk": f"TopK, k = {config.k}",
        "batchtopk": f"BatchTopK, k = {config.k} on average",
        "jumprelu": f"JumpReLU, L0 coefficient {config.l0_coefficient:g}"
        + (f", target L0 {config.target_l0:g}" if config.target_l0 is not None else ""),
        "gated": f"gated, L1 coefficient {config.l1_coefficient:g}",
    }[config.activation]


def architecture_facts(config: TranscoderConfig) -> dict[str, str]:
    facts = {
        "kind": kind(config),
        "features": f"{config.num_features:,} ({config.num_features / config.d_in:g} times the input width)",
        "activation": sparsity(config),
        "decoder": (
            "tied to the encoder"
            if config.tied
            else f"rows {'at unit norm' if config.decoder_norm == 'unit' else 'of free norm'}"
        )
        + ("" if config.decoder_bias else ", no bias"),
        "loss": LOSSES[config.loss_reduction],
        "AuxK coefficient": f"{config.auxk_coefficient:g} ({config.auxk} dead features a token)"
        if config.auxk_coefficient
        else "0",
        "parameters": f"{parameters(config):,}",
    }
    if config.matryoshka_sizes:
        facts["Matryoshka prefixes"] = ", ".join(f"{size:,}" for size in config.matryoshka_sizes)
    return facts


def parameters(config: TranscoderConfig) -> int:
    """Of the whole dictionary; one in training may hold a shard of them."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in TranscoderModel(config).parameters())


def training_sentence(summary: Mapping[str, Any], count: int) -> Markdown:
    data = escape(summary["dataset"]) if summary.get("dataset") else "text whose name was not recorded"
    rows = (
        f" ({summary['dataset_rows']:,} blocks of {summary['context_length']} tokens)"
        if summary.get("dataset_rows")
        else ""
    )
    tokens = f"{summary['tokens']:,} tokens" if summary.get("tokens") is not None else "tokens that were not counted"
    who = "Each of them was trained" if count > 1 else "Trained"
    return Markdown(f"{who} on activations of {tokens} from {data}{rows}, shuffled.")


# Key of the training summary -> what a reader calls it.
TRAINING_FACTS = {
    "tokens": "tokens",
    "steps": "optimizer steps",
    "batch_tokens": "tokens of a step",
    "learning_rate": "learning rate",
    "lr_scheduler": "learning rate schedule",
    "warmup_steps": "warm-up steps",
    "optimizer": "optimizer",
    "weight_decay": "weight decay",
    "max_grad_norm": "gradient clipped at norm",
    "sparsity_warmup": "share of the run in which penalties rise",
    "dead_after_tokens": "tokens of silence after which a feature counts as dead",
    "precision": "precision of the dictionary's products",
    "base_model_dtype": "precision of the base model",
    "buffer_tokens": "tokens shuffled together",
    "processes": "processes",
    "device": "device",
    "seed": "seed",
}


def versions_text(versions: Mapping[str, str]) -> str:
    order = ("hf_transcoders", "transformers", "torch")
    known = sorted(versions, key=lambda name: (order.index(name) if name in order else len(order), name))
    return ", ".join(f"{escape(name)} {escape(versions[name])}" for name in known)


def listed(words: Iterable[str]) -> Markdown:
    """`a`, `a and b`, `a, b and c`."""
    words = [escape(word) for word in words]
    return Markdown(" and ".join(filter(None, (", ".join(words[:-1]), *words[-1:]))))


def shown_value(value) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return f"{value:g}" if isinstance(value, float) else str(value)


def duration(seconds: float) -> str:
    return f"{seconds:.0f} seconds" if seconds < 120 else f"{seconds / 60:,.0f} minutes"


def literal(text: str) -> str:
    """A text as Python (and JSON) writes it, on one line."""
    return json.dumps(text, ensure_ascii=False)


def slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-") or "unnamed"


def is_hub_id(name: str | None) -> bool:
    """Whether this can be the id of a repo; a folder's path is none."""
    if not isinstance(name, str):
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True
