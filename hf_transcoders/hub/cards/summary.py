"""The title and summary of a card: the kind of dictionaries, and their headline metrics."""

from typing import Any

from ...text.markdown import Markdown, code, escape, one_line
from ..public import public_name
from .facts import CardFacts
from .wording import dtype_name, kind, listed, place, site_and_width, written_places


_NORMALIZATIONS = {
    "none": "none",
    "scale": "one factor for each site, measured before training and kept with the weights",
    "standardize": "mean and standard deviation of each dimension, measured before training and kept with the weights",
    "token_scale": "root mean square of each token's input, multiplied into its reconstruction again",
    "token_standardize": "mean and standard deviation of each token's input, put into its reconstruction again",
}


def title(facts: CardFacts) -> str:
    base_model = one_line(public_name(facts.base_model).split("/")[-1]) if facts.base_model else "an unnamed model"
    if facts.is_cross_layer:
        return f"Cross-layer transcoder of {base_model}"
    if facts.only is None:
        kinds = {kind(config) for config in facts.configs.values()}
        what = {"SAE": "Sparse autoencoders"}.get(kinds.pop(), "Transcoders") if len(kinds) == 1 else "Dictionaries"
        return f"{what} of {base_model}"
    config = facts.configs[facts.only]
    what = {"SAE": "Sparse autoencoder"}.get(kind(config), kind(config).capitalize())
    return f"{what} of {base_model}" + (f", {config.output_site}" if config.output_site else "")


def kinds_counted(facts: CardFacts) -> Markdown:
    """`2 transcoders and 1 SAE`."""
    kinds = [kind(config) for config in facts.configs.values()]
    return listed(f"{kinds.count(kind)} {kind}{'s' * (kinds.count(kind) > 1)}" for kind in dict.fromkeys(kinds))


def base_link(facts: CardFacts) -> Markdown:
    if facts.base_model is None:
        return Markdown("a language model that was not recorded")
    if facts.base_model_is_on_hub:
        return Markdown(f"[{escape(facts.base_model)}](https://huggingface.co/{facts.base_model})")
    return code(facts.base_model)


def described(facts: CardFacts, name: str) -> dict[str, Any]:
    """A description of one dictionary, for a card about it alone."""
    config = facts.configs[name]
    return {
        "config": config,
        "features": f"{config.num_features:,}",
        "kind": {"SAE": "sparse autoencoder (SAE)"}.get(kind(config), kind(config)),
        "reads": place(config.input_site),
        "writes": written_places(config) if len(config.output_sites) > 1 else place(config.output_site),
        "reads_site": site_and_width(config.input_site, config.d_in),
        "writes_site": site_and_width(config.output_site, config.d_out),
        "normalization": _NORMALIZATIONS[config.normalization],
        "dtype": code(dtype_name(facts.dictionaries[name].dtype)),
    }


def summary(facts: CardFacts) -> Markdown | None:
    """The headline metrics in a few sentences; `None` if nothing was measured."""
    if not facts.metrics:
        return None
    protocol = facts.reports[0].protocol
    sentences = []
    where = ""
    if len(facts.reports) == 1:
        where = (
            f"On {escape(protocol['dataset'])} ({protocol['fidelity_tokens']:,} tokens), "
            if protocol["dataset"]
            else f"On {protocol['fidelity_tokens']:,} tokens of unnamed text, "
        )
    l0, variance, fvu = (
        _range(facts, "l0", "{:.1f}"),
        _range(facts, "explained_variance", "{:.1%}"),
        _range(facts, "fvu", "{:.3f}"),
    )
    if l0 and variance:
        sentences.append(
            f"{where}**{l0} features** are active on a token and explain **{variance} of the variance** (FVU {fvu})."
        )
    zero, mean = _range(facts, "ce_recovered_zero", "{:.1%}"), _range(facts, "ce_recovered_mean", "{:.1%}")
    if zero:
        against = f" ({mean} of what its mean costs)" if mean else ""
        sentences.append(
            f"Put in place of the true activations, {'they recover' if facts.only is None else 'it recovers'} "
            f"**{zero} of the loss** that setting them to zero costs{against}"
            + (f", on {protocol['loss_tokens']:,} tokens." if len(facts.reports) == 1 else ".")
        )
    if facts.together is not None:
        sentences += _together(facts)
    dead = _range(facts, "dead_fraction", "{:.1%}")
    if dead:
        sentences.append(f"{dead} of the features never fired on this text.")
    return Markdown(" ".join(sentences))


def _together(facts: CardFacts) -> list[str]:
    """The metrics of the language model with all dictionaries spliced in at once."""
    zero, mean, kl, agreement = (
        facts.together.get(metric) for metric in ("ce_recovered_zero", "ce_recovered_mean", "kl", "top1_agreement")
    )
    if None in (zero, mean, kl, agreement):
        return []
    return [
        f"With all {len(facts.dictionaries)} in place at once they recover **{zero:.1%} of the loss** that setting all "
        f"these outputs to zero costs ({mean:.1%} of what their means cost); the most likely next token stays the same "
        f"after {agreement:.1%} of the tokens (KL to the original {kl:.3f})."
    ]


def _range(facts: CardFacts, metric: str, form: str) -> str:
    """The range of a metric over all dictionaries, `0.25` or `0.25 to 0.5`; empty if one of them lacks it."""
    values = [metrics.get(metric) for metrics in facts.metrics.values()]
    if not values or None in values:
        return ""
    low, high = form.format(min(values)), form.format(max(values))
    return low if low == high else f"{low} to {high}"
