"""Make model cards: gather the facts, write the sections and fill the template."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from ...evaluation.evaluation_report import HEADLINE_METRICS, METRICS, EvaluationReport
from ...models.modeling_transcoder import TranscoderModel
from ...models.saved_files import Files, open_dictionary
from ...models.set_index import INDEX_NAME
from ...models.transcoder_set import TranscoderSet, open_set
from ...reports.page import MEANINGS
from ...text.markdown import Markdown, code, escape
from ...text.strict_json import read_json
from ...tracking.run import Run, recorded_run
from . import architecture, limits, origin, summary, training, usage
from .card import TranscoderCard, generated
from .card_pictures import result_pictures, training_pictures
from .facts import CardFacts, DictionaryFacts, gather_facts
from .metadata import metadata
from .wording import listed


def make_card(
    dictionaries: Mapping[str, TranscoderModel | DictionaryFacts] | TranscoderSet | TranscoderModel | DictionaryFacts,
    *,
    repo_id: str | None = None,
    report: EvaluationReport | None = None,
    run: Run | None = None,
    license: str | None = None,
    tags: Sequence[str] | None = None,
    model_name: str | None = None,
    notes: str | None = None,
) -> TranscoderCard:
    """
    Makes the model card of a dictionary or a set. Facts that were not measured or recorded are left out, and the card says
    so. The same arguments give the same card.

    Args:
        dictionaries ([`TranscoderModel`], [`TranscoderSet`] or `Mapping[str, TranscoderModel]`):
            Dictionaries of the card. Their configurations hold base model, sites, training and evaluation.
        repo_id (`str`, *optional*):
            Repo on the Hub that the usage example loads the dictionaries from. By default it loads them from the current
            folder.
        report ([`EvaluationReport`], *optional*):
            Evaluation of the dictionaries. Defaults to the `evaluation` of their configurations.
        run ([`Run`], *optional*):
            Training run of the dictionaries, for the training log and its curves.
        license (`str`, *optional*):
            License of the weights, by its identifier on the Hub. Left out by default.
        tags (`Sequence[str]`, *optional*):
            Additional tags of the repo.
        model_name (`str`, *optional*):
            Name of the model in the metadata. Defaults to the name of the repo.
        notes (`str`, *optional*):
            Additional text below the summary, in Markdown.

    Returns:
        [`TranscoderCard`]
    """
    facts = gather_facts(dictionaries, repo_id, report, run)
    return _rendered(facts, license, tags, model_name, notes, pictures=True)


def render_card(
    dictionaries: Mapping[str, TranscoderModel] | TranscoderSet | TranscoderModel,
    *,
    repo_id: str | None = None,
    report: EvaluationReport | None = None,
    run: Run | None = None,
    license: str | None = None,
) -> str:
    """
    Renders the model card as text, without the pictures of [`make_card`].

    Args:
        dictionaries, repo_id, report, run, license: Same as in [`make_card`].

    Returns:
        `str`: text of README.md with its metadata.
    """
    return _rendered(gather_facts(dictionaries, repo_id, report, run), license, pictures=False).text


def card_of_folder(
    folder: str | os.PathLike,
    *,
    repo_id: str | None = None,
    report: EvaluationReport | None = None,
    license: str | None = None,
) -> TranscoderCard:
    """
    Makes the model card of a saved dictionary or set without loading its weights, with the log of the run recorded in the
    same folder.

    Args:
        folder (`str` or `os.PathLike`): Folder written by `save_pretrained` or a trainer.
        repo_id, report, license: Same as in [`make_card`].

    Returns:
        [`TranscoderCard`]
    """
    folder = Path(folder)
    files = Files(folder)
    if (folder / INDEX_NAME).exists():
        described = {name: DictionaryFacts.of_saved(saved) for name, saved in open_set(files).items()}
    else:
        described = DictionaryFacts.of_saved(open_dictionary(files))
    run = recorded_run(folder)
    if run is None and (folder / "trainer_state.json").exists():
        history = read_json(folder / "trainer_state.json", allow_nan=True).get("log_history")
        entries = history if isinstance(history, list) else []
        run = Run.from_log_history(
            entry for entry in entries if isinstance(entry, dict) and isinstance(entry.get("step"), int)
        )
    return make_card(described, repo_id=repo_id, report=report, run=run, license=license)


def _rendered(
    facts: CardFacts,
    license: str | None,
    tags: Sequence[str] | None = None,
    model_name: str | None = None,
    notes: str | None = None,
    *,
    pictures: bool,
) -> TranscoderCard:
    results = list(result_pictures(facts)) if pictures else []
    curves = list(training_pictures(facts)) if pictures else []
    text = _template().render(
        metadata=Markdown(metadata(facts, license, tags, model_name).to_yaml(line_break="\n")),
        title=summary.title(facts),
        single=facts.only is not None,
        only=summary.described(facts, facts.only) if facts.only else None,
        dictionaries=facts.configs,
        kinds=summary.kinds_counted(facts),
        base=summary.base_link(facts),
        base_name=code(facts.base_model) if facts.base_model else "its base model",
        summary=summary.summary(facts),
        notes=Markdown(notes) if notes else None,
        usage=usage.usage(facts),
        usage_note=usage.usage_note(facts),
        results=[{"markdown": Markdown(report.markdown())} for report in facts.reports],
        unmeasured=listed(code(name) for name in facts.configs if name not in facts.metrics),
        meanings=[(METRICS[metric], MEANINGS[metric]) for metric in HEADLINE_METRICS],
        result_figures=[picture.markdown for picture in results],
        sites_table=architecture.sites_table(facts),
        dtypes=architecture.dtypes(facts),
        base_dtype=architecture.base_dtype(facts),
        formulas=architecture.formulas(facts),
        architecture=architecture.architecture(facts),
        training=training.training(facts),
        log=training.log_table(facts),
        log_note=training.log_note(facts),
        alerts=training.alerts(facts),
        training_figures=[picture.markdown for picture in curves],
        limits=limits.limits(facts),
        environment=origin.environment(facts),
        citation_note=origin.citation(facts),
    )
    return generated(text, {picture.path: picture.svg for picture in (*results, *curves)})


def _template():
    from jinja2 import Environment, PackageLoader, StrictUndefined

    # jinja2 has no autoescape for Markdown: every value that is not marked as Markdown is passed to `escape`.
    environment = Environment(
        loader=PackageLoader("hf_transcoders.hub"),
        undefined=StrictUndefined,
        finalize=escape,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template("model_card.md")
