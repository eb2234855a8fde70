"""The sites, formulas and architecture of the dictionaries of a card."""

from ...models.configuration_transcoder import TranscoderConfig
from ...models.cross_layer.configuration_cross_layer import CrossLayerSourceConfig
from ...models.model_types import count_parameters
from ...text.markdown import Markdown, code, escape, table
from .facts import CardFacts, grouped
from .wording import dtype_name, kind, listed, place_and_name, written_places


_LOSSES = {
    "normalized": "squared error, summed over dimensions, over the targets' variance",
    "mean": "squared error, mean over tokens and dimensions",
    "sum": "squared error, summed over dimensions, mean over tokens",
    "target_norm": "squared error, mean over dimensions, over the target's norm",
}


def sites_table(facts: CardFacts) -> Markdown:
    rows = [
        (
            code(name),
            place_and_name(c.input_site),
            written_places(c),
            f"{c.d_in} → {c.d_out}",
            c.normalization,
            "yes" if c.skip_connection else "no",
        )
        for name, c in facts.configs.items()
    ]
    head = ("dictionary", "reads", "predicts", "width", "normalization", "skip connection")
    sites = table(head, rows, numbers=False)
    if not facts.many:
        return sites
    return Markdown(f"<details><summary>Each of the {len(rows)}</summary>\n\n{sites}\n\n</details>")


def dtypes(facts: CardFacts) -> Markdown:
    """The types of the stored weights."""
    return listed(
        code(dtype) for dtype in dict.fromkeys(dtype_name(each.dtype) for each in facts.dictionaries.values())
    )


def base_dtype(facts: CardFacts) -> Markdown:
    """The type that the base model ran in, as the end of a sentence."""
    names = dict.fromkeys(s["base_model_dtype"] for s in facts.summaries.values() if s.get("base_model_dtype"))
    return Markdown(f"; the base model ran in {listed(map(code, names))} in training" if names else "")


def formulas(facts: CardFacts) -> list[tuple[Markdown, Markdown]]:
    """The distinct formulas, each with the dictionaries that compute it."""
    texts = {name: _formula(config) for name, config in facts.configs.items()}
    groups = grouped(texts)
    every = Markdown("All of them") if len(groups) == 1 else None
    return [(Markdown(texts[names[0]]), every or listed(map(code, names))) for names in groups]


def architecture(facts: CardFacts) -> Markdown:
    columns = {name: _properties(config) for name, config in facts.configs.items()}
    if facts.only:
        return table(("property", "value"), list(columns[facts.only].items()), numbers=False)
    heads = list(dict.fromkeys(head for properties in columns.values() for head in properties))
    # Properties that are the same everywhere take one line; the others a column.
    varied = [head for head in heads if len({properties.get(head) for properties in columns.values()}) > 1]
    shared = [f"{head}: {escape(columns[next(iter(columns))][head])}" for head in heads if head not in varied]
    text = f"All of them: {'; '.join(shared)}." if shared else ""
    if varied:
        rows = [(code(name), *(properties.get(head, "-") for head in varied)) for name, properties in columns.items()]
        text = table(("dictionary", *varied), rows, numbers=False) + ("\n\n" + text if text else "")
    return Markdown(text)


# What a normalization does to the input, and what undoes it on the output.
_BY_SITE = ("(input - input_mean) / input_scale", "* output_scale + output_mean")
_NORMALIZATION_STEPS = {
    "scale": _BY_SITE,
    "standardize": _BY_SITE,
    "token_scale": ("input / rms(input)", "* rms(input)"),
    "token_standardize": ("(input - mean(input)) / (std(input) + 1e-5)", "* std(input) + mean(input)"),
}


def _formula(config: TranscoderConfig) -> str:
    """The function of a dictionary, one step per line."""
    lines = []
    steps = _NORMALIZATION_STEPS.get(config.normalization)
    x = "input"
    if steps:
        lines.append(f"x        = {steps[0]}")
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
    cross_layer = isinstance(config, CrossLayerSourceConfig)
    output = "sum over this layer and those before it of W_dec^T features" if cross_layer else "W_dec^T features"
    if config.decoder_bias:
        output += " + b_dec"
    if config.skip_connection:
        output += f" + W_skip {x}"
    lines.append(f"output   = ({output}) {steps[1]}" if steps else f"output   = {output}")
    if config.tied:
        lines.append("W_dec    = W_enc, with rows of unit norm")
    return "\n".join(lines)


def _sparsity(config: TranscoderConfig) -> str:
    return {
        "relu": f"ReLU, L1 coefficient {config.l1_coefficient:g}",
        "topk": f"TopK, k = {config.k}",
        "batchtopk": f"BatchTopK, k = {config.k} on average",
        "jumprelu": f"JumpReLU, L0 coefficient {config.l0_coefficient:g}"
        + (f", target L0 {config.target_l0:g}" if config.target_l0 is not None else ""),
        "gated": f"gated, L1 coefficient {config.l1_coefficient:g}",
    }[config.activation] + _cross_layer_sparsity(config)


def _cross_layer_sparsity(config: TranscoderConfig) -> str:
    if not isinstance(config, CrossLayerSourceConfig):
        return ""
    found = " over all layers" if config.batchtopk_scope == "all" else ""
    if config.tanh_coefficient:
        found += f", tanh coefficient {config.tanh_coefficient:g} (scale {config.tanh_scale:g})"
    return found


def _properties(config: TranscoderConfig) -> dict[str, str]:
    properties = {
        "kind": kind(config),
        "features": f"{config.num_features:,} ({config.num_features / config.d_in:g} times the input width)",
        "activation": _sparsity(config),
        "decoder": (
            "tied to the encoder"
            if config.tied
            else f"rows {'at unit norm' if config.decoder_norm == 'unit' else 'of free norm'}"
        )
        + ("" if config.decoder_bias else ", no bias"),
        "loss": _LOSSES[config.loss_reduction],
        "AuxK coefficient": f"{config.auxk_coefficient:g} ({config.auxk} dead features a token)"
        if config.auxk_coefficient
        else "0",
        "parameters": f"{count_parameters(config):,}",
    }
    if config.matryoshka_sizes:
        properties["Matryoshka prefixes"] = ", ".join(f"{size:,}" for size in config.matryoshka_sizes)
    return properties
