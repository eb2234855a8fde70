"""The software versions and citations of a card."""

from collections.abc import Collection, Mapping

from ...text.markdown import Markdown, code, escape
from .facts import CardFacts, grouped
from .wording import listed


# Method -> paper to cite.
_PAPERS = {
    "transcoder": "transcoders: [arXiv 2406.11944](https://arxiv.org/abs/2406.11944)",
    "skip": "skip transcoders: [arXiv 2501.18823](https://arxiv.org/abs/2501.18823)",
    "sae": "sparse autoencoders: [arXiv 2309.08600](https://arxiv.org/abs/2309.08600)",
    "topk": "TopK and AuxK: [arXiv 2406.04093](https://arxiv.org/abs/2406.04093)",
    "batchtopk": "BatchTopK: [arXiv 2412.06410](https://arxiv.org/abs/2412.06410)",
    "jumprelu": "JumpReLU: [arXiv 2407.14435](https://arxiv.org/abs/2407.14435)",
    "gated": "gated dictionaries: [arXiv 2404.16014](https://arxiv.org/abs/2404.16014)",
    "matryoshka": "Matryoshka dictionaries: [arXiv 2503.17547](https://arxiv.org/abs/2503.17547)",
}


def environment(facts: CardFacts) -> Markdown:
    """The versions used for training and evaluation, and the format of the files."""
    lines = []
    versions = {name: summary["versions"] for name, summary in facts.summaries.items() if summary.get("versions")}
    for names in grouped(versions):
        lines.append(f"- Trained with {_versions(versions[names[0]])}" + _which(facts, names))
    for report in facts.reports:
        protocol = report.protocol
        lines.append(
            f"- Evaluated with {_versions(protocol['versions'])}, in {code(protocol['dtype'])} on "
            f"{escape(protocol['device'])}" + _which(facts, report.dictionaries)
        )
    written = dict.fromkeys(config.format_version for config in facts.configs.values())
    lines.append(f"- Format of the files: {listed(map(str, written))}, safetensors")
    return Markdown("\n".join(lines))


def citation(facts: CardFacts) -> Markdown:
    """The papers of the methods, as the sentence before the library's own entry."""
    keys = []
    for config in facts.configs.values():
        keys.append("sae" if config.is_autoencoder else "transcoder")
        keys += ["skip"] * config.skip_connection + ["matryoshka"] * bool(config.matryoshka_sizes)
        keys.append(config.activation)
    papers = [_PAPERS[key] for key in dict.fromkeys(keys) if key in _PAPERS]
    return Markdown(f"The methods: {'; '.join(papers)}. The library:")


def _versions(versions: Mapping[str, str]) -> str:
    order = ("hf_transcoders", "transformers", "torch")
    known = sorted(versions, key=lambda name: (order.index(name) if name in order else len(order), name))
    return ", ".join(f"{escape(name)} {escape(versions[name])}" for name in known)


def _which(facts: CardFacts, names: Collection[str]) -> str:
    return "" if len(names) == len(facts.configs) else f" ({listed(map(code, names))})"
