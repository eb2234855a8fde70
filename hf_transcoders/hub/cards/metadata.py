"""The metadata of a card: tags, base model, data sets, and the metrics of its model index."""

from collections.abc import Sequence

from huggingface_hub import EvalResult, ModelCardData

from ...evaluation.evaluation_report import HEADLINE_METRICS, METRICS, TOGETHER
from ...hub_ids import is_hub_id
from ...models.modeling_transcoder import TranscoderModel
from ...text.markdown import one_line
from .facts import CardFacts
from .summary import title
from .wording import slug


def metadata(
    facts: CardFacts, license: str | None = None, tags: Sequence[str] | None = None, model_name: str | None = None
) -> ModelCardData:
    """The front matter of a card. `license`, `tags` and `model_name` are the same as in [`make_card`]."""
    datasets = dict.fromkeys(s.get("dataset_id") for s in facts.summaries.values() if s.get("dataset_id"))
    base_model = (
        {"base_model": facts.base_model, "base_model_relation": "adapter"} if facts.base_model_is_on_hub else {}
    )
    results = _eval_results(facts)
    name = one_line(model_name or (facts.repo_id.split("/")[-1] if facts.repo_id else title(facts)))
    return ModelCardData(
        library_name="hf_transcoders",
        license=license,
        datasets=[name for name in datasets if is_hub_id(name)] or None,
        tags=_tags(facts, tags or ()),
        model_name=name if results else None,
        eval_results=results or None,
        **base_model,
    )


def _tags(facts: CardFacts, further: Sequence[str]) -> list[str]:
    tags = ["hf_transcoders"]
    if not all(config.is_autoencoder for config in facts.configs.values()):
        tags.append("transcoder")
    if any(config.is_autoencoder for config in facts.configs.values()):
        tags.append("sparse-autoencoder")
    tags.append("mechanistic-interpretability")
    # Tags that users and trackers have added: the Hub's tab "Training metrics" depends on one of them.
    further = [*further, *(tag for d in facts.dictionaries.values() for tag in d.tags)]
    tags += [tag for tag in further if tag not in TranscoderModel.model_tags]
    return list(dict.fromkeys(map(one_line, tags)))


def _eval_results(facts: CardFacts) -> list[EvalResult]:
    results = []
    for report in facts.reports:
        protocol = report.protocol
        dataset = one_line(protocol["dataset"] or "unnamed")
        hub_id = protocol.get("dataset_id")
        columns = {name: facts.metrics[name] for name in report.dictionaries}
        if report.together is not None:
            # For many dictionaries the index has the metrics of the whole set, and the card's table those of each.
            columns = {**({} if facts.many else columns), TOGETHER: report.together}
        for name, metrics in columns.items():
            which = "" if facts.only else f" ({name})"
            for metric in HEADLINE_METRICS:
                if metrics.get(metric) is None:
                    continue
                results.append(
                    EvalResult(
                        task_type="feature-extraction",
                        task_name="Reconstruction of activations",
                        dataset_type=hub_id if is_hub_id(hub_id) else slug(dataset),
                        dataset_name=dataset,
                        dataset_split=one_line(protocol["dataset_split"]) if protocol["dataset_split"] else None,
                        metric_type=metric,
                        metric_name=METRICS[metric] + which,
                        metric_value=metrics[metric],
                    )
                )
    return results
