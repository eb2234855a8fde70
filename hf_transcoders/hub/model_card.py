"""The model card: everything known about dictionaries, written down for those who find them."""

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData
from transformers.utils import logging

from ..evaluation.evaluation_report import HEADLINE_METRICS, METRICS, EvaluationReport, format_number
from ..files import atomic_file
from ..lm import Site
from ..markdown import Markdown, code, escape, one_line, table
from ..models import TranscoderConfig, TranscoderModel, TranscoderSet
from ..models.transcoder_set import INDEX_NAME, dictionary_name
from ..reports import plots
from ..reports.page import MEANINGS
from ..tracking import Run
from ..tracking.local import FOLDER as TRACKING
from ..tracking.local import RUN_FILE
from .card_words import (
    NORMALIZATIONS,
    PAPERS,
    TRAINING_FACTS,
    architecture_facts,
    dtype_name,
    duration,
    formula,
    is_hub_id,
    kind,
    listed,
    literal,
    place,
    place_and_name,
    shown_value,
    site_and_width,
    slug,
    training_sentence,
    versions_text,
)


logger = logging.get_logger(__name__)

#: Folder of the card's pictures, beside it.
ASSETS = "assets"

# Ends every card, followed by a hash of what stands before it: a card with another hash was edited.
_SEAL = "\n<!-- Written by hf_transcoders; a card that was edited is not overwritten. sha256: "

# Rows of the training log, and dictionaries that it can show beside each other.
_LOG_ROWS, _LOG_COLUMNS = 12, 6


@dataclass
class TranscoderCard:
    """
    A model card and its pictures.

    Args:
        text (`str`): README.md as a whole, with its metadata.
        files (`dict[str, str]`): Path beside README.md -> content, of the pictures that the text shows.
    """

    text: str
    files: dict[str, str] = field(default_factory=dict)

    def save(self, folder: str | os.PathLike) -> Path:
        """
        Writes the card and its pictures into a folder. A README.md that somebody wrote or edited there stays as it is; the
        card then goes into README.generated.md.

        Returns:
            `Path`: the card's file.
        """
        for name, content in self.files.items():
            _write(Path(folder, name), content)
        path = Path(folder, "README.md")
        if path.exists() and not is_generated(path.read_text(encoding="utf-8")):
            path = path.with_name("README.generated.md")
            logger.warning(
                f"README.md in {folder} was edited by hand and stays as it is: the new model card is in {path.name}."
            )
        return _write(path, self.text)


def is_generated(text: str) -> bool:
    """Whether a README.md is a card of ours that nobody has edited since."""
    card, found, seal = text.rpartition(_SEAL)
    return bool(found) and seal == _seal(card).removeprefix(_SEAL)


def card_of_folder(
    folder: str | os.PathLike,
    *,
    repo_id: str | None = None,
    report: EvaluationReport | None = None,
    license: str | None = None,
) -> TranscoderCard:
    """
    The model card of a saved dictionary or set, with the log of the run whose records lie in the same folder.

    Args:
        folder (`str` or `os.PathLike`): What `save_pretrained` or a trainer has written.
        repo_id, report, license: As for [`make_card`].

    Returns:
        [`TranscoderCard`]
    """
    folder = Path(folder)
    kind = TranscoderSet if (folder / INDEX_NAME).exists() else TranscoderModel
    run = None
    if (folder / TRACKING / RUN_FILE).exists():
        run = Run.load(folder)
    elif (folder / "trainer_state.json").exists():
        run = Run.from_log_history(json.loads((folder / "trainer_state.json").read_text())["log_history"])
    return make_card(kind.from_pretrained(folder), repo_id=repo_id, report=report, run=run, license=license)


def render_card(
    dictionaries: Mapping[str, TranscoderModel] | TranscoderSet | TranscoderModel,
    *,
    repo_id: str | None = None,
    report: EvaluationReport | None = None,
    run: Run | None = None,
    license: str | None = None,
) -> str:
    """
    The model card as text alone, without pictures. [`make_card`] also has these.

    Args:
        dictionaries, repo_id, report, run, license: As for [`make_card`].

    Returns:
        `str`: README.md as a whole, with its metadata.
    """
    return _Card(dictionaries, repo_id, report, run, license).render(pictures=False).text


def make_card(
    dictionaries: Mapping[str, TranscoderModel] | TranscoderSet | TranscoderModel,
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
    The model card of a dictionary or a set, from what is known about it. What was not measured or recorded is left out,
    and the card says so. The same arguments give the same card.

    Args:
        dictionaries ([`TranscoderModel`], [`TranscoderSet`] or `Mapping[str, TranscoderModel]`):
            What the card is about. Their configurations hold base model, sites, training and evaluation.
        repo_id (`str`, *optional*):
            Where they will be on the Hub; the usage example loads them from there, and without it from the folder that it
            is run in.
        report ([`EvaluationReport`], *optional*):
            How good they are. Defaults to what the configurations hold in `evaluation`.
        run ([`Run`], *optional*):
            The run that trained them, for the training log and its curves.
        license (`str`, *optional*):
            The licence of the weights, by its identifier on the Hub. It is left out unless given.
        tags (`Sequence[str]`, *optional*):
            Further tags of the repo.
        model_name (`str`, *optional*):
            The name under which the metadata lists the numbers. Defaults to that of the repo.
        notes (`str`, *optional*):
            What readers should know besides, in Markdown of your own; it stands below the summary.

    Returns:
        [`TranscoderCard`]
    """
    return _Card(dictionaries, repo_id, report, run, license, tags, model_name, notes).render(pictures=True)


class _Card:
    """The facts of a card, each put into words where it is known."""

    def __init__(self, dictionaries, repo_id, report, run, license, tags=None, model_name=None, notes=None):
        if isinstance(dictionaries, TranscoderModel):
            self.is_set = False
            dictionaries = {dictionary_name(dictionaries.config): dictionaries}
        else:
            self.is_set = True
            dictionaries = dict(dictionaries.items())
        self.dictionaries: dict[str, TranscoderModel] = dictionaries
        self.configs: dict[str, TranscoderConfig] = {name: d.config for name, d in dictionaries.items()}
        self.repo_id, self.run, self.license = repo_id, run, license
        self.tags, self.model_name, self.notes = tags or (), model_name, notes
        self.together = None
        self.reports = self._reports(report)
        self.metrics = {
            name: {key: value for key, value in entry["metrics"].items() if value is not None}
            for report in self.reports
            for name, entry in report.dictionaries.items()
        }
        self.summaries = {
            name: config.training_summary for name, config in self.configs.items() if config.training_summary
        }
        self.base = next((c.base_model_name_or_path for c in self.configs.values() if c.base_model_name_or_path), None)
        self.revision = next((c.base_model_revision for c in self.configs.values() if c.base_model_revision), None)

    @property
    def only(self) -> str | None:
        """The name of the dictionary where there is a single one."""
        return next(iter(self.configs)) if len(self.configs) == 1 else None

    def _reports(self, report) -> list[EvaluationReport]:
        """One report for each protocol: the one given, and what the configurations know of the other dictionaries."""
        evaluations = {name: c.evaluation for name, c in self.configs.items() if c.evaluation}
        if report is not None:
            names = list(report.dictionaries)
            # A single dictionary has no name of its own: the report may know it under another.
            own = dict(zip(self.configs, names, strict=True)) if len(names) == len(self.configs) == 1 else {}
            for name in self.configs:
                if own.get(name, name) in report.dictionaries:
                    evaluations[name] = report.of(own.get(name, name))
            if set(names) == set(self.configs):
                self.together = report.to_dict()["together"]
        reports = []
        for names in _grouped({name: e["protocol"] for name, e in evaluations.items()}):
            entries = {
                name: {
                    "metrics": _sorted(evaluations[name]["metrics"]),
                    "density_histogram": evaluations[name]["density_histogram"],
                    "config": {},
                }
                for name in self.configs
                if name in names
            }
            reports.append(EvaluationReport(entries, _sorted(evaluations[names[0]]["protocol"])))
        if len(reports) == 1:
            reports[0].together = self.together
        return reports

    # ------------------------------------------------------------------------------------------------ the whole

    def render(self, pictures: bool) -> TranscoderCard:
        from jinja2 import Environment, PackageLoader, StrictUndefined

        # Markdown has no autoescape of its own: every value that is not marked as Markdown goes through `escape`.
        environment = Environment(
            loader=PackageLoader("hf_transcoders.hub"),
            undefined=StrictUndefined,
            finalize=escape,
            trim_blocks=True,
            lstrip_blocks=True,
            keep_trailing_newline=True,
        )
        files, result_figures, training_figures = {}, [], []
        if pictures:
            for figures, drawn in (
                (result_figures, self._result_plots()),
                (training_figures, self._training_plots()),
            ):
                for name, title, svg in drawn:
                    files[f"{ASSETS}/{name}.svg"] = _standalone(svg)
                    figures.append(Markdown(f"![{escape(title)}]({ASSETS}/{name}.svg)"))
        text = environment.get_template("model_card.md").render(
            metadata=Markdown(self._metadata().to_yaml(line_break="\n")),
            title=self._title(),
            single=self.only is not None,
            only=self._describe(self.only) if self.only else None,
            dictionaries=self.configs,
            kinds=self._kinds(),
            base=self._base_link(),
            base_name=code(self.base) if self.base else "its base model",
            summary=self._summary(),
            notes=Markdown(self.notes) if self.notes else None,
            usage=self._usage(),
            usage_note=self._usage_note(),
            results=[{"markdown": Markdown(report.markdown())} for report in self.reports],
            unmeasured=listed(code(name) for name in self.configs if name not in self.metrics),
            meanings=[(METRICS[metric], MEANINGS[metric]) for metric in HEADLINE_METRICS],
            result_figures=result_figures,
            sites_table=self._sites_table(),
            dtypes=listed(code(dtype) for dtype in dict.fromkeys(map(dtype_name, self.dictionaries.values()))),
            base_dtype=self._base_dtype(),
            formulas=self._formulas(),
            architecture=self._architecture(),
            training=self._training(),
            log=self._log(),
            log_note=self._log_note(),
            alerts=self._alerts(),
            training_figures=training_figures,
            limits=self._limits(),
            environment=self._environment(),
            citation_note=self._citation(),
        )
        return TranscoderCard(text + _seal(text), files)

    def _metadata(self) -> ModelCardData:
        datasets = dict.fromkeys(s.get("dataset_id") for s in self.summaries.values() if s.get("dataset_id"))
        base = {"base_model": self.base, "base_model_relation": "adapter"} if is_hub_id(self.base) else {}
        results = self._eval_results()
        name = one_line(self.model_name or (self.repo_id.split("/")[-1] if self.repo_id else self._title()))
        return ModelCardData(
            library_name="hf_transcoders",
            license=self.license,
            datasets=[name for name in datasets if is_hub_id(name)] or None,
            tags=self._tags(),
            model_name=name if results else None,
            eval_results=results or None,
            **base,
        )

    def _tags(self) -> list[str]:
        tags = ["hf_transcoders"]
        if not all(config.is_autoencoder for config in self.configs.values()):
            tags.append("transcoder")
        if any(config.is_autoencoder for config in self.configs.values()):
            tags.append("sparse-autoencoder")
        tags.append("mechanistic-interpretability")
        # What users and trackers have added: the Hub's tab "Training metrics" lives on such a tag.
        further = [*self.tags, *(tag for d in self.dictionaries.values() for tag in d.model_tags)]
        tags += [tag for tag in further if tag not in TranscoderModel.model_tags]
        return list(dict.fromkeys(map(one_line, tags)))

    def _eval_results(self) -> list[EvalResult]:
        results = []
        for report in self.reports:
            protocol = report.protocol
            dataset = one_line(protocol["dataset"] or "unnamed")
            hub_id = protocol.get("dataset_id")
            columns = {name: self.metrics[name] for name in report.dictionaries}
            if report.together is not None:
                columns["all together"] = report.together
            for name, metrics in columns.items():
                for metric in HEADLINE_METRICS:
                    if metrics.get(metric) is None:
                        continue
                    which = "" if self.only else f" ({name})"
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

    # ------------------------------------------------------------------------------------------------ what it is

    def _title(self) -> str:
        base = one_line(self.base.rstrip("/").split("/")[-1]) if self.base else "an unnamed model"
        if self.only is None:
            kinds = {kind(config) for config in self.configs.values()}
            what = (
                {"SAE": "Sparse autoencoders"}.get(kinds.pop(), "Transcoders") if len(kinds) == 1 else "Dictionaries"
            )
            return f"{what} of {base}"
        config = self.configs[self.only]
        what = {"SAE": "Sparse autoencoder"}.get(kind(config), kind(config).capitalize())
        return f"{what} of {base}" + (f", {config.output_site}" if config.output_site else "")

    def _kinds(self) -> str:
        kinds = [kind(config) for config in self.configs.values()]
        return listed(f"{kinds.count(kind)} {kind}{'s' * (kinds.count(kind) > 1)}" for kind in dict.fromkeys(kinds))

    def _base_link(self) -> Markdown:
        if self.base is None:
            return Markdown("a language model that was not recorded")
        if is_hub_id(self.base):
            return Markdown(f"[{escape(self.base)}](https://huggingface.co/{self.base})")
        return code(self.base)

    def _describe(self, name: str) -> dict[str, Any]:
        config = self.configs[name]
        return {
            "config": config,
            "features": f"{config.num_features:,}",
            "kind": {"SAE": "sparse autoencoder (SAE)"}.get(kind(config), kind(config)),
            "reads": place(config.input_site),
            "writes": place(config.output_site),
            "reads_site": site_and_width(config.input_site, config.d_in),
            "writes_site": site_and_width(config.output_site, config.d_out),
            "normalization": NORMALIZATIONS[config.normalization],
            "dtype": code(dtype_name(self.dictionaries[name])),
        }

    def _summary(self) -> Markdown | None:
        if not self.metrics:
            return None
        protocol = self.reports[0].protocol
        sentences = []
        where = ""
        if len(self.reports) == 1:
            where = (
                f"On {escape(protocol['dataset'] or 'unnamed text')} ({protocol['fidelity_tokens']:,} tokens), "
                if protocol["dataset"]
                else f"On {protocol['fidelity_tokens']:,} tokens of unnamed text, "
            )
        l0, variance, fvu = (
            self._range("l0", "{:.1f}"),
            self._range("explained_variance", "{:.1%}"),
            self._range("fvu", "{:.3f}"),
        )
        if l0 and variance:
            sentences.append(
                f"{where}**{l0} features** are active on a token and explain **{variance} of the variance** "
                f"(FVU {fvu})."
            )
        zero, mean = self._range("ce_recovered_zero", "{:.1%}"), self._range("ce_recovered_mean", "{:.1%}")
        if zero:
            against = f" ({mean} of what its mean costs)" if mean else ""
            sentences.append(
                f"Put in place of the true activations, {'they recover' if self.only is None else 'it recovers'} "
                f"**{zero} of the loss** that setting them to zero costs{against}"
                + (f", on {protocol['loss_tokens']:,} tokens." if len(self.reports) == 1 else ".")
            )
        dead = self._range("dead_fraction", "{:.1%}")
        if dead:
            sentences.append(f"{dead} of the features never fired on this text.")
        return Markdown(" ".join(sentences))

    def _range(self, metric: str, form: str) -> str:
        """A metric of all dictionaries: `0.25`, or `0.25 to 0.5`; nothing where one of them lacks it."""
        values = [metrics.get(metric) for metrics in self.metrics.values()]
        if not values or None in values:
            return ""
        low, high = form.format(min(values)), form.format(max(values))
        return low if low == high else f"{low} to {high}"

    # ------------------------------------------------------------------------------------------------ how to use it

    def _shown(self) -> dict[str, TranscoderConfig]:
        """The dictionaries that the usage example puts into the model: one for each place that can be written to."""
        shown, taken = {}, set()
        for name, config in self.configs.items():
            writable = config.input_site and config.output_site and Site.parse(config.output_site).point != "resid_mid"
            if writable and config.output_site not in taken:
                taken.add(config.output_site)
                shown[name] = config
        return shown

    def _usage(self) -> Markdown:
        source = literal(self.repo_id or ".")
        where = "" if self.repo_id else "  # this folder, or a repo's id"
        shown = self._shown()
        base = literal(self.base or "the base model's id")
        revision = f", revision={literal(self.revision)}" if self.revision and is_hub_id(self.base) else ""
        splices = bool(shown) and self.base is not None
        imports = [*(["TranscoderSet"] if self.is_set else ["TranscoderModel"]), *(["splice"] if splices else [])]
        lines = [
            *(
                ["from transformers import AutoModelForCausalLM, AutoTokenizer", ""]
                if splices
                else ["import torch", ""]
            ),
            f"from hf_transcoders import {', '.join(imports)}",
            "",
        ]
        if self.is_set:
            loading = [f"transcoders = TranscoderSet.from_pretrained({source}){where}"]
        else:
            loading = [f"transcoder = TranscoderModel.from_pretrained({source}){where}"]
        if not splices:
            config = next(iter(self.configs.values()))
            if self.is_set:
                loading.append(f"transcoder = transcoders[{literal(next(iter(self.configs)))}]")
            lines += [
                *loading,
                f"activations = torch.randn(1, {config.d_in})  # put the model's own activations here",
                "output = transcoder(activations)",
                "print(output.features.shape, output.reconstruction.shape)",
            ]
            return Markdown("\n".join(lines))
        used = "transcoders" if self.is_set else "transcoder"
        if self.is_set and len(shown) < len(self.configs):
            loading.append(f"transcoder = transcoders[{literal(next(iter(shown)))}]")
            used = "transcoder"
        site = next(iter(shown.values())).output_site
        lines += [
            f"base = AutoModelForCausalLM.from_pretrained({base}{revision})",
            f"tokenizer = AutoTokenizer.from_pretrained({base}{revision})",
            *loading,
            "",
            'inputs = tokenizer("The capital of France is", return_tensors="pt")',
            "",
            "# Read features along the way: the model answers as before.",
            f'with splice(base, {used}, error="keep") as features:',
            "    base(**inputs)",
            f"strongest = features[{literal(site)}][0, -1].topk(5)  # of the last token",
            "print(strongest.indices.tolist(), strongest.values.tolist())",
            "",
            "# Put the reconstruction in place of the true activations.",
            f'with splice(base, {used}, error="drop"):',
            "    logits = base(**inputs).logits",
        ]
        return Markdown("\n".join(lines))

    def _usage_note(self) -> str | None:
        if self.is_set:
            name = next(iter(self.configs))
            note = Markdown(
                f"One dictionary alone: `TranscoderModel.from_pretrained({literal(self.repo_id or '.')}, "
                f"subfolder={literal(name)})`."
            )
            if len(self._shown()) < len(self.configs):
                note = Markdown(note + " Dictionaries that write to one place are put into the model one at a time.")
            return note
        return None

    # ------------------------------------------------------------------------------------------------ details

    def _sites_table(self) -> Markdown:
        rows = [
            (
                code(name),
                place_and_name(c.input_site),
                place_and_name(c.output_site),
                f"{c.d_in} → {c.d_out}",
                c.normalization,
                "yes" if c.skip_connection else "no",
            )
            for name, c in self.configs.items()
        ]
        return table(
            ("dictionary", "reads", "predicts", "width", "normalization", "skip connection"), rows, numbers=False
        )

    def _base_dtype(self) -> Markdown:
        dtypes = dict.fromkeys(s["base_model_dtype"] for s in self.summaries.values() if s.get("base_model_dtype"))
        if not dtypes:
            return Markdown("")
        return Markdown(f"; the base model ran in {listed(map(code, dtypes))} in training")

    def _formulas(self) -> list[tuple[Markdown, Markdown]]:
        formulas = {name: formula(config) for name, config in self.configs.items()}
        return [(Markdown(formulas[names[0]]), listed(map(code, names))) for names in _grouped(formulas)]

    def _architecture(self) -> Markdown:
        columns = {name: architecture_facts(config) for name, config in self.configs.items()}
        if self.only:
            return table(("property", "value"), list(columns[self.only].items()), numbers=False)
        heads = list(dict.fromkeys(head for facts in columns.values() for head in facts))
        # Facts that are the same everywhere take one line; the others a column.
        varied = [head for head in heads if len({facts.get(head) for facts in columns.values()}) > 1]
        shared = [f"{head}: {escape(columns[next(iter(columns))][head])}" for head in heads if head not in varied]
        text = f"All of them: {'; '.join(shared)}." if shared else ""
        if varied:
            rows = [(code(name), *(facts.get(head, "-") for head in varied)) for name, facts in columns.items()]
            text = table(("dictionary", *varied), rows, numbers=False) + ("\n\n" + text if text else "")
        return Markdown(text)

    # ------------------------------------------------------------------------------------------------ training

    def _training(self) -> list[dict[str, Markdown]]:
        groups = []
        for names in _grouped(self.summaries):
            summary = self.summaries[names[0]]
            every = len(names) == len(self.configs)
            groups.append(
                {
                    "names": None if every else listed(map(code, names)),
                    "sentence": training_sentence(summary, len(names)),
                    "table": table(("setting", "value"), self._training_facts(names[0]), numbers=False),
                }
            )
        return groups

    def _training_facts(self, name: str) -> list[tuple[str, str]]:
        config, summary = self.configs[name], dict(self.summaries[name])
        if not config.l1_coefficient and not config.l0_coefficient:
            summary.pop("sparsity_warmup", None)
        return [
            (head, shown_value(summary[key])) for key, head in TRAINING_FACTS.items() if summary.get(key) is not None
        ]

    def _train_log(self) -> list[dict[str, float]]:
        """Entries of the training log under their plain names: `step`, `tokens`, `<dictionary>/fvu`."""
        entries = []
        for line in self.run.scalars if self.run else ():
            values = {key.removeprefix("train/"): v for key, v in line.items() if key.startswith("train/")}
            if any(f"{name}/fvu" in values for name in self.configs):
                entries.append({"step": line["step"], **{k: v for k, v in values.items() if v is not None}})
        return entries

    def _log(self) -> Markdown | None:
        entries = _thinned(self._train_log())
        if not entries:
            return None
        columns = {"step": "step", "tokens": "tokens", "loss": "loss"}
        if self.only:
            for metric in ("fvu", "l0", "dead_fraction", "grad_norm"):
                columns[f"{self.only}/{metric}"] = METRICS.get(metric, "gradient norm")
        elif len(self.configs) <= _LOG_COLUMNS:
            columns |= {f"{name}/fvu": Markdown(f"FVU of {code(name)}") for name in self.configs}
        columns = {key: head for key, head in columns.items() if any(key in entry for entry in entries)}
        rows = [
            [
                f"{entry[key]:,.0f}" if key in ("step", "tokens") and key in entry else format_number(entry.get(key))
                for key in columns
            ]
            for entry in entries
        ]
        return table(list(columns.values()), rows)

    def _log_note(self) -> str | None:
        entries = self._train_log()
        if not entries:
            return None
        runtime = self.run.latest().get("train/train_runtime")
        took = f" The run took {duration(runtime)}." if runtime else ""
        status = self.run.facts.get("status")
        ended = f" It ended as '{status}'." if status in ("failed", "interrupted") else ""
        shown = len(_thinned(entries))
        which = f"{shown} of its {len(entries)} entries" if shown < len(entries) else "all of its entries"
        return f"The log of the run is on batches of training text, each seen before the step that learns from it; the table has {which}.{took}{ended}"

    def _alerts(self) -> Markdown | None:
        titles = [one_line(alert["title"]) for alert in self.run.alerts] if self.run else []
        counted = (f"{title} ({titles.count(title)})" for title in dict.fromkeys(titles))
        return listed(counted) if titles else None

    # ------------------------------------------------------------------------------------------------ limits

    def _limits(self) -> list[Markdown]:
        limits = []
        if self.base is None:
            limits.append("The base model was not recorded: these weights mean nothing for any other.")
        else:
            revision = (
                f"revision {code(self.revision)}"
                if self.revision
                else "the revision that was current at the time; which one was not recorded"
            )
            limits.append(
                f"Made for {code(self.base)}, {revision}. On another revision, a fine-tuned version or another precision "
                "nothing here was measured."
            )
        first = self._common("skip_first")
        if first:
            limits.append(
                f"The first {'position' if first == 1 else f'{first} positions'} of every block of text "
                f"{'was' if first == 1 else 'were'} left out of training and evaluation, because models park an attention "
                "sink there with activations many times the usual size. Features there mean nothing, and a dictionary put "
                "in place of the model's own activations should leave that position as it is (`splice(..., mask=...)`)."
            )
        for report in self.reports:
            if report.protocol["special_token_ids"]:
                limits.append("Special tokens (beginning and end of text, padding) were left out as well.")
                break
        if outlier := self._common("outlier_factor"):
            limits.append(f"Training also left out tokens whose activation is longer than {outlier:g} medians.")
        limits += self._dead_limits()
        data = dict.fromkeys(s["dataset"] for s in self.summaries.values() if s.get("dataset"))
        trained = f"Trained on {listed(data)}" if data else "What text it was trained on was not recorded"
        length = self._common("context_length")
        contexts = f" and contexts of more than {length} tokens" if length else ""
        limits.append(f"{trained}. Other kinds of text, other languages{contexts} were not measured.")
        limits += self._unmeasured_limits()
        return [Markdown(limit) for limit in limits]

    def _common(self, key: str):
        """A fact of the training that all dictionaries share; `None` otherwise."""
        values = {summary.get(key) for summary in self.summaries.values()}
        return values.pop() if len(values) == 1 else None

    def _dead_limits(self) -> list[str]:
        lines = []
        for report in self.reports:
            never = {name: entry["density_histogram"]["never_fired"] for name, entry in report.dictionaries.items()}
            counts = listed(
                Markdown(
                    f"{count:,} of {self.configs[name].num_features:,}" + ("" if self.only else f" in {code(name)}")
                )
                for name, count in never.items()
                if count
            )
            tokens = f"{report.protocol['fidelity_tokens']:,}"
            lines.append(
                f"Features that never fired on the {tokens} tokens of the evaluation: {counts}. They may be dead, or rarer "
                "than this text can show."
                if counts
                else f"Every feature fired at least once on the {tokens} tokens of the evaluation."
            )
        return lines

    def _unmeasured_limits(self) -> list[str]:
        missing = []
        if not self.metrics:
            missing.append("how well they reconstruct, and what the language model loses with them in place")
        else:
            unknown = [
                METRICS[m] for m in HEADLINE_METRICS if any(m not in metrics for metrics in self.metrics.values())
            ]
            if unknown:
                missing.append(listed(unknown) + " (where the table has a dash)")
            if self.only is None and self.together is None:
                missing.append("the language model with all dictionaries in place at once")
        missing.append("what single features mean: a name given to one is a hypothesis")
        missing.append("whether the features are what the language model itself computes with, beyond its loss")
        return [f"Not measured: {'; '.join(missing)}."]

    # ------------------------------------------------------------------------------------------------ around

    def _environment(self) -> Markdown:
        lines = []
        for names in _grouped({name: s["versions"] for name, s in self.summaries.items() if s.get("versions")}):
            lines.append(f"- Trained with {versions_text(self.summaries[names[0]]['versions'])}" + self._which(names))
        for report in self.reports:
            protocol = report.protocol
            lines.append(
                f"- Evaluated with {versions_text(protocol['versions'])}, in {code(protocol['dtype'])} on "
                f"{escape(protocol['device'])}" + self._which(report.dictionaries)
            )
        written = dict.fromkeys(config.format_version for config in self.configs.values())
        lines.append(f"- Format of the files: {listed(map(str, written))}, safetensors")
        return Markdown("\n".join(lines))

    def _which(self, names) -> str:
        return "" if len(names) == len(self.configs) else f" ({listed(map(code, names))})"

    def _citation(self) -> Markdown:
        keys = []
        for config in self.configs.values():
            keys.append("sae" if config.is_autoencoder else "transcoder")
            keys += ["skip"] * config.skip_connection + ["matryoshka"] * bool(config.matryoshka_sizes)
            keys.append(config.activation)
        papers = [PAPERS[key] for key in dict.fromkeys(keys) if key in PAPERS]
        return Markdown(f"The methods: {'; '.join(papers)}. The library:")

    # ------------------------------------------------------------------------------------------------ pictures

    def _result_plots(self):
        for number, report in enumerate(self.reports, 1):
            ending = "" if len(self.reports) == 1 else f"-{number}"
            if len(report.dictionaries) > 1:
                for metric, title in (("fvu", "Reconstruction error"), ("ce_recovered_zero", "Loss recovered")):
                    svg = plots.sparsity_fidelity(report, metric, f"{title} over sparsity", METRICS[metric])
                    if svg:
                        yield f"{metric}{ending}", f"{title} over active features per token", svg
            yield f"density{ending}", "How often features fire", plots.density_histogram(report)

    def _training_plots(self):
        history, names = self._train_log(), list(self.configs)
        for metric, title in (
            ("fvu", "Reconstruction error in training"),
            ("dead_fraction", "Dead features in training"),
        ):
            svg = plots.loss_curves(history, metric, title, METRICS[metric], names=names)
            if svg:
                yield f"training-{metric}", title, svg


def _seal(text: str) -> str:
    return f"{_SEAL}{hashlib.sha256(text.encode()).hexdigest()} -->\n"


def _grouped(values: Mapping[str, Any]) -> list[list[str]]:
    """Names whose values are equal, together and in their order."""
    groups: list[list[str]] = []
    for name, value in values.items():
        for group in groups:
            if values[group[0]] == value:
                group.append(name)
                break
        else:
            groups.append([name])
    return groups


def _sorted(value):
    """With the order that a file gives to names, so that a saved dictionary has the same card."""
    return {key: _sorted(value[key]) for key in sorted(value)} if isinstance(value, dict) else value


def _thinned(entries: Sequence, rows: int = _LOG_ROWS) -> list:
    """At most so many entries, evenly spread, with the first and the last."""
    if len(entries) <= rows:
        return list(entries)
    return [entries[round(i * (len(entries) - 1) / (rows - 1))] for i in range(rows)]


def _standalone(svg: str) -> str:
    """A chart as a file: of its own size, dark on white, whatever page shows it."""
    opening, body = svg.split("\n", 1)
    _, _, width, height = re.search(r'viewBox="([^"]*)"', opening)[1].split()
    opening = opening.replace("<svg ", f'<svg width="{width}" height="{height}" color="#1f2328" ', 1)
    return f'{opening}\n<rect width="100%" height="100%" fill="#fff"/>\n{body}\n'


def _write(path: Path, text: str) -> Path:
    with atomic_file(path) as partial:
        partial.write_text(text, encoding="utf-8")
    return path
