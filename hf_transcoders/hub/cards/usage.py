"""The usage example of a card, which runs as it is."""

from ...lm.sites import Site
from ...models.configuration_transcoder import TranscoderConfig
from ...text.markdown import Markdown
from .facts import CardFacts
from .wording import literal


def usage(facts: CardFacts) -> Markdown:
    """The example: features and replacement inside the model, or plain tensors if no dictionary can be spliced in."""
    source = literal(facts.repo_id or ".")
    where = "" if facts.repo_id else "  # this folder, or a repo's id"
    if facts.is_set:
        loading = [f"transcoders = {facts.loader}.from_pretrained({source}){where}"]
    else:
        loading = [f"transcoder = TranscoderModel.from_pretrained({source}){where}"]
    spliced = _spliced(facts)
    lines = (
        _in_the_model(facts, spliced, loading)
        if spliced and facts.base_model is not None
        else _on_tensors(facts, loading)
    )
    return Markdown("\n".join(lines))


def usage_note(facts: CardFacts) -> Markdown | None:
    """A note on loading one dictionary of a set; `None` for a single dictionary."""
    if not facts.is_set:
        return None
    if facts.is_cross_layer:
        return Markdown(
            "The layers belong together: the reconstruction of a site is the sum of what its layer and those before it write."
        )
    name = next(iter(facts.configs))
    note = (
        f"One dictionary alone: `TranscoderModel.from_pretrained({literal(facts.repo_id or '.')}, "
        f"subfolder={literal(name)})`."
    )
    if len(_spliced(facts)) < len(facts.configs):
        note += " Dictionaries that write to one place are put into the model one at a time."
    return Markdown(note)


def _spliced(facts: CardFacts) -> dict[str, TranscoderConfig]:
    """The dictionaries that the example splices into the model: one for each writable site."""
    spliced, taken = {}, set()
    for name, config in facts.configs.items():
        writable = config.input_site and config.output_site and Site.parse(config.output_site).point != "resid_mid"
        if writable and config.output_site not in taken:
            taken.add(config.output_site)
            spliced[name] = config
    return spliced


def _on_tensors(facts: CardFacts, loading: list[str]) -> list[str]:
    name, config = next(iter(facts.configs.items()))
    return [
        "import torch",
        "",
        f"from hf_transcoders import {facts.loader}",
        "",
        *loading,
        *([f"transcoder = transcoders[{literal(name)}]"] if facts.is_set else []),
        f"activations = torch.randn(1, {config.d_in})  # put the model's own activations here",
        *(
            ["print(transcoder.encode(activations).shape)"]
            if facts.is_cross_layer
            else [
                "output = transcoder(activations)",
                "print(output.features.shape, output.reconstruction.shape)",
            ]
        ),
    ]


def _in_the_model(facts: CardFacts, spliced: dict[str, TranscoderConfig], loading: list[str]) -> list[str]:
    name_or_path = literal(facts.base_model)
    revision = f", revision={literal(facts.revision)}" if facts.revision and facts.base_model_is_on_hub else ""
    name, config = next(iter(spliced.items()))
    # If members of a set write to the same site, they can be spliced in only one at a time.
    one_of_set = facts.is_set and len(spliced) < len(facts.configs)
    used = "transcoders" if facts.is_set and not one_of_set else "transcoder"
    return [
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f"from hf_transcoders import {facts.loader}, splice",
        "",
        f"model = AutoModelForCausalLM.from_pretrained({name_or_path}{revision})",
        f"tokenizer = AutoTokenizer.from_pretrained({name_or_path}{revision})",
        *loading,
        *([f"transcoder = transcoders[{literal(name)}]"] if one_of_set else []),
        "",
        'inputs = tokenizer("The capital of France is", return_tensors="pt")',
        "",
        "# Read features along the way: the model answers as before.",
        f'with splice(model, {used}, error="keep") as features:',
        "    model(**inputs)",
        f"strongest = features[{literal(config.output_site)}][0, -1].topk(5)  # of the last token",
        "print(strongest.indices.tolist(), strongest.values.tolist())",
        "",
        "# Put the reconstruction in place of the true activations.",
        f'with splice(model, {used}, error="drop"):',
        "    logits = model(**inputs).logits",
    ]
