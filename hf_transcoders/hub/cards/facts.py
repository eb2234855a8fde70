"""Gather the facts for a card from configurations, evaluations and a run."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from ...errors import TranscoderError
from ...evaluation.evaluation_report import EvaluationReport
from ...evaluation.report_file import check_evaluation
from ...hub_ids import is_hub_id
from ...models.configuration_transcoder import TranscoderConfig
from ...models.cross_layer.configuration_cross_layer import CrossLayerSourceConfig
from ...models.cross_layer.modeling_cross_layer import CrossLayerTranscoder
from ...models.model_types import dictionary_configs, saved_config
from ...models.modeling_transcoder import TranscoderModel
from ...models.saved_files import SavedDictionary, saved_dtype
from ...models.set_index import dictionary_name
from ...models.transcoder_set import TranscoderSet
from ...text import logging
from ...tracking.run import Run
from ..public import hidden_names, public_name, public_values
from .recorded import is_number, known_training


logger = logging.get_logger(__name__)

# The largest number of dictionaries that a card lists one by one.
_FEW = 6


@dataclass
class DictionaryFacts:
    """
    One dictionary as a card describes it, without its weights.

    Args:
        config ([`TranscoderConfig`]): Configuration.
        dtype (`torch.dtype`): Type of the stored weights.
        tags (`Sequence[str]`, *optional*): Tags that users and trackers have added.
    """

    config: TranscoderConfig
    dtype: torch.dtype
    tags: Sequence[str] = ()

    @classmethod
    def of(cls, dictionary: "TranscoderModel | DictionaryFacts") -> "DictionaryFacts":
        """The facts of a dictionary in memory."""
        if isinstance(dictionary, DictionaryFacts):
            return dictionary
        return cls(dictionary.config, dictionary.dtype, dictionary.model_tags)

    @classmethod
    def of_saved(cls, saved: SavedDictionary) -> "DictionaryFacts":
        """The facts of a saved dictionary, from its configuration and the headers of its weights."""
        config = saved_config(saved, TranscoderModel)
        return cls(config, saved_dtype(saved, "W_enc"))

    @classmethod
    def of_saved_cross_layer(cls, saved: SavedDictionary) -> "dict[str, DictionaryFacts]":
        """The facts of the layers of a saved cross-layer transcoder."""
        layers = dictionary_configs(saved_config(saved, CrossLayerTranscoder)) or {}
        dtype = saved_dtype(saved, "sources.0.W_enc")
        return {name: cls(config, dtype) for name, config in layers.items()}


@dataclass
class CardFacts:
    """
    Facts about the dictionaries of a card.

    Args:
        dictionaries (`dict[str, DictionaryFacts]`): Dictionaries by name.
        is_set (`bool`): Whether the dictionaries are saved as a set. Otherwise there is one, saved alone.
        repo_id (`str`, *optional*): Repo of the dictionaries on the Hub.
        reports (`list[EvaluationReport]`): Evaluations, one for each protocol.
        together (`dict[str, float]`, *optional*): Metrics with all dictionaries spliced in at once.
        run ([`Run`], *optional*): Training run of the dictionaries.
    """

    dictionaries: dict[str, DictionaryFacts]
    is_set: bool
    repo_id: str | None
    reports: list[EvaluationReport]
    together: dict[str, float] | None
    run: Run | None

    @property
    def configs(self) -> dict[str, TranscoderConfig]:
        return {name: dictionary.config for name, dictionary in self.dictionaries.items()}

    @property
    def is_cross_layer(self) -> bool:
        """Whether the dictionaries are the layers of a cross-layer transcoder."""
        return all(isinstance(config, CrossLayerSourceConfig) for config in self.configs.values())

    @property
    def loader(self) -> str:
        """Name of the class that loads them."""
        if self.is_cross_layer:
            return "CrossLayerTranscoder"
        return "TranscoderSet" if self.is_set else "TranscoderModel"

    @property
    def only(self) -> str | None:
        """The name of the dictionary if there is a single one."""
        return next(iter(self.dictionaries)) if len(self.dictionaries) == 1 else None

    @property
    def many(self) -> bool:
        """Whether there are too many dictionaries to name each of them in more than one table."""
        return len(self.dictionaries) > _FEW

    @property
    def base_model(self) -> str | None:
        """Name of the base model; for a published card, without local paths."""
        return self._base_model if self.repo_id is None else public_name(self._base_model)

    @property
    def base_model_is_on_hub(self) -> bool:
        """Whether that name is the id of a repo."""
        name = public_name(self._base_model)
        return is_hub_id(name) and (name == self._base_model or "/" in name)

    @property
    def _base_model(self) -> str | None:
        return next((c.base_model_name_or_path for c in self.configs.values() if c.base_model_name_or_path), None)

    @property
    def revision(self) -> str | None:
        """Revision of the base model."""
        return next((c.base_model_revision for c in self.configs.values() if c.base_model_revision), None)

    @property
    def summaries(self) -> dict[str, dict[str, Any]]:
        """Training summaries by dictionary, where the configurations have them."""
        known = {name: known_training(config.training_summary) for name, config in self.configs.items()}
        return {name: summary for name, summary in known.items() if summary}

    @property
    def metrics(self) -> dict[str, dict[str, float]]:
        """Metrics by dictionary, for those that were evaluated."""
        return {
            name: {key: value for key, value in entry["metrics"].items() if value is not None}
            for report in self.reports
            for name, entry in report.dictionaries.items()
        }

    @cached_property
    def log(self) -> list[dict[str, float]]:
        """Entries of the training log under their plain names: `step`, `tokens`, `<dictionary>/fvu`."""
        entries = []
        for line in self.run.scalars if self.run else ():
            values = {key.removeprefix("train/"): v for key, v in line.items() if key.startswith("train/")}
            if any(f"{name}/fvu" in values for name in self.dictionaries):
                entries.append({"step": line["step"], **{k: v for k, v in values.items() if is_number(v)}})
        return entries


def gather_facts(
    dictionaries: Mapping[str, TranscoderModel | DictionaryFacts] | TranscoderSet | TranscoderModel | DictionaryFacts,
    repo_id: str | None = None,
    report: EvaluationReport | None = None,
    run: Run | None = None,
) -> CardFacts:
    """The facts in the arguments of [`make_card`]."""
    is_set = not isinstance(dictionaries, TranscoderModel | DictionaryFacts)
    given = dictionaries.items() if is_set else [(dictionary_name(dictionaries.config), dictionaries)]
    named = {name: DictionaryFacts.of(dictionary) for name, dictionary in given}
    together = report.to_dict()["together"] if report is not None and set(report.dictionaries) == set(named) else None
    reports = _reports({name: dictionary.config for name, dictionary in named.items()}, report)
    if repo_id is not None:
        bases = [dictionary.config.base_model_name_or_path for dictionary in named.values()]
        for each in reports:
            each.protocol = public_values(each.protocol, hidden_names([*bases, each.protocol["base_model"]]))
    if len(reports) == 1:
        reports[0].together = together
    return CardFacts(named, is_set, repo_id, reports, together, run)


def grouped(values: Mapping[str, Any]) -> list[list[str]]:
    """Names grouped by equal values, in their order."""
    groups: list[list[str]] = []
    for name, value in values.items():
        for group in groups:
            if values[group[0]] == value:
                group.append(name)
                break
        else:
            groups.append([name])
    return groups


def _reports(configs: Mapping[str, TranscoderConfig], report: EvaluationReport | None) -> list[EvaluationReport]:
    """One report for each protocol: the given one, and those in the configurations of the other dictionaries."""
    evaluations = {}
    for name, config in configs.items():
        if not config.evaluation:
            continue
        try:
            check_evaluation(config.evaluation, config.num_features, f"The evaluation in the configuration of {name}")
        except TranscoderError as error:
            logger.warning(f"{error} The card leaves the evaluation out.")
        else:
            evaluations[name] = config.evaluation
    if report is not None:
        names = list(report.dictionaries)
        # A single dictionary has no name of its own: the report may know it under another.
        own = dict(zip(configs, names, strict=True)) if len(names) == len(configs) == 1 else {}
        for name in configs:
            if own.get(name, name) in report.dictionaries:
                evaluations[name] = report.of(own.get(name, name))
    reports = []
    # Histograms with different bins cannot share a picture.
    for names in grouped(
        {name: (e["protocol"], e["density_histogram"]["log10_edges"]) for name, e in evaluations.items()}
    ):
        entries = {
            name: {
                "metrics": _sorted(evaluations[name]["metrics"]),
                "density_histogram": evaluations[name]["density_histogram"],
                "config": {},
            }
            for name in configs
            if name in names
        }
        reports.append(EvaluationReport(entries, _sorted(evaluations[names[0]]["protocol"])))
    return reports


def _sorted(value):
    """A copy with keys in the order of a saved file, so that a saved dictionary has the same card."""
    return {key: _sorted(value[key]) for key in sorted(value)} if isinstance(value, dict) else value
