"""Losses of a model with transcoders in place of its MLPs: each layer alone, and many layers at once."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from ...dictionaries import named_dictionaries
from ...errors import TranscoderError
from ...evaluation.evaluator import ORIGINAL, EvaluationReport, TranscoderEvaluator
from ...evaluation.statistics import ce_recovered
from ...lm.architectures import num_layers
from ...lm.modes import in_eval_mode
from ...lm.sites import output_site
from ...models.modeling_transcoder import TranscoderModel
from ...models.transcoder_set import TranscoderSet
from ...reports.sections import Table, tables_text
from ...text.columns import paired
from ..published import REPLACEMENT, PublishedStudy, published_figure, published_study, with_published


#: Names of the groups of layers that are replaced at once, in the order of the table.
ALL, ALL_BUT_LAST, INNER = "all layers", "all but the last layer", "all but the first and last layer"


@dataclass
class Change:
    """
    Losses of a changed model.

    Args:
        ce (`float`): Cross-entropy, in nats per token.
        kl (`float`): KL divergence from the unchanged model's predictions, in nats per token.
        top1_agreement (`float`): Share of tokens after which the most likely next token stays the same.
    """

    ce: float
    kl: float
    top1_agreement: float


@dataclass
class ReplacedLayers:
    """
    Losses with some layers replaced or ablated, as one row of the table.

    Args:
        name (`str`): Name of the dictionary or of the group of layers.
        layers (`list[int]`): Replaced layers.
        replaced, zero, mean (`Change`): Losses with dictionaries, zero-ablation and mean-ablation.
        recovered_zero, recovered_mean (`float`): Share of the loss increase of each ablation that the dictionaries avoid.
        l0, fvu (`float`, *optional*): L0 and fraction of variance unexplained, for a single dictionary.
    """

    name: str
    layers: list[int]
    replaced: Change
    zero: Change
    mean: Change
    recovered_zero: float
    recovered_mean: float
    l0: float | None = None
    fvu: float | None = None


@dataclass
class ReplacementStudy:
    """
    Results of whole-model replacement.

    Args:
        ce_original (`float`): Cross-entropy of the unchanged model.
        dictionaries (`list[ReplacedLayers]`): Each dictionary alone, from the first layer to the last.
        groups (`list[ReplacedLayers]`): Many layers at once.
        num_layers (`int`): Layers of the model.
        protocol (`dict`): Measurement protocol, as in [`EvaluationReport`].
        published ([`PublishedStudy`], *optional*): Published figures, if they apply to this model and its transcoders.
    """

    ce_original: float
    dictionaries: list[ReplacedLayers]
    groups: list[ReplacedLayers]
    num_layers: int
    protocol: dict[str, Any]
    published: PublishedStudy | None = None

    def protocol_lines(self) -> dict[str, str]:
        """Return the protocol as readable names and values."""
        return EvaluationReport({}, self.protocol).protocol_lines()

    def to_text(self) -> str:
        """Format the tables and the protocol as text for a terminal."""
        return "\n".join([tables_text(replacement_tables(self)), "", paired(self.protocol_lines())])

    __str__ = to_text

    def to_dict(self) -> dict[str, Any]:
        """Return all results as JSON values."""
        return asdict(self)


@torch.no_grad()
def replacement_study(
    evaluator: TranscoderEvaluator,
    dictionaries: TranscoderModel | TranscoderSet | Mapping[str, TranscoderModel] | Iterable[TranscoderModel],
    *,
    transcoders_name: str | None = None,
) -> ReplacementStudy:
    """
    Measure cross-entropy, KL divergence and top-1 agreement with dictionaries in place of the outputs of a model: each layer
    alone, all layers, all but the last, and all but the first and last; next to zero- and mean-ablation of these layers.

    Args:
        evaluator ([`TranscoderEvaluator`]):
            Evaluator with the model and the text.
        dictionaries ([`TranscoderModel`], [`TranscoderSet`], a mapping from name to dictionary, or a list):
            Dictionaries, which write to different sites, all of them in layers.
        transcoders_name (`str`, *optional*):
            Repo or folder of the dictionaries, for recognizing those of the paper.

    Returns:
        [`ReplacementStudy`]

    Raises:
        [`TranscoderError`]: A dictionary does not fit the model, or two dictionaries write to one site.

    Source: Dunefsky, Chlenski and Nanda (2024), arXiv 2406.11944, which replaces all MLPs of GPT-2 small.
    """
    model = evaluator.base_model
    named = named_dictionaries(dictionaries)
    evaluator.check(named, together=True)
    outputs = {name: output_site(dictionary) for name, dictionary in named.items()}
    if outside := [name for name, site in outputs.items() if site.layer is None]:
        raise TranscoderError(
            f"'{outside[0]}' writes '{outputs[outside[0]]}', which belongs to no layer: leave it out."
        )
    named = dict(sorted(named.items(), key=lambda item: outputs[item[0]].layer))  # pyright: ignore[reportCallIssue]
    last = num_layers(model) - 1
    groups = {
        ALL: list(named),
        ALL_BUT_LAST: [name for name in named if outputs[name].layer != last],
        INNER: [name for name in named if outputs[name].layer not in (0, last)],
    }
    # For a partial set, groups may be equal or have a single layer.
    groups = {
        group: names
        for number, (group, names) in enumerate(groups.items())
        if len(names) > 1 and names not in list(groups.values())[:number]
    }
    with in_eval_mode(model, *named.values()):
        reconstruction, features = evaluator.measure_fidelity(named)
        means = {outputs[name]: reconstruction[name].mean_target() for name in named}
        losses = evaluator.measure_losses(named, means, groups)
    computed = {key: statistics.compute() for key, statistics in losses.items()}
    original = computed[ORIGINAL]["ce"]

    def row(name, names, ablated, **fidelity):
        replaced, zero, mean = (
            Change(**computed[key]) for key in (("spliced", name), ("zero", ablated), ("mean", ablated))
        )
        return ReplacedLayers(
            name=name,
            layers=[outputs[each].layer for each in names],
            replaced=replaced,
            zero=zero,
            mean=mean,
            recovered_zero=ce_recovered(original, replaced.ce, zero.ce),
            recovered_mean=ce_recovered(original, replaced.ce, mean.ce),
            **fidelity,
        )

    return ReplacementStudy(
        ce_original=original,
        dictionaries=[
            row(
                name,
                [name],
                str(outputs[name]),
                l0=features[name].compute()["l0"],
                fvu=reconstruction[name].compute()["fvu"],
            )
            for name in named
        ],
        groups=[row(group, names, group) for group, names in groups.items()],
        num_layers=last + 1,
        protocol=evaluator.protocol(losses[ORIGINAL].tokens),
        published=published_study(REPLACEMENT, model.config.name_or_path, transcoders_name),
    )


def replacement_tables(study: ReplacementStudy) -> list[Table]:
    headers = ["", "CE", "CE zero", "CE mean", "recovered (zero)", "recovered (mean)", "KL", "KL zero", "KL mean"]
    headers += ["top-1", "top-1 zero", "top-1 mean"]
    paper = study.published
    figures = {ALL: ("all ce", "all kl", ""), ALL_BUT_LAST: ("all ce", "all kl", "")}
    figures[INNER] = ("inner ce", "", "inner ce zero")
    rows = [["unchanged", _loss(study.ce_original), *[""] * 10, _paper_of(paper, "ce_original", "", "")]]
    for row in study.groups:
        count = f" ({len(row.layers)} of {study.num_layers})"
        rows.append([row.name + count, *_losses(row), _paper_of(paper, *figures[row.name])])
    note = "CE and KL in nats per token; recovered: share of the loss increase of an ablation that the dictionaries avoid."
    groups = with_published("Many layers at once", headers, rows, note, paper)
    alone = [[row.name, *_losses(row), f"{row.l0:.4g}", f"{row.fvu:.4g}"] for row in study.dictionaries]
    return [groups, Table("Each layer alone", [*headers, "L0", "FVU"], alone)]


def _losses(row) -> list[str]:
    changes = (row.replaced, row.zero, row.mean)
    return [
        *(_loss(change.ce) for change in changes),
        *(f"{share:.1%}" if math.isfinite(share) else "–" for share in (row.recovered_zero, row.recovered_mean)),
        *(_loss(change.kl) for change in changes),
        *(f"{change.top1_agreement:.1%}" for change in changes),
    ]


def _loss(value: float) -> str:
    return f"{value:.4f}"


def _paper_of(paper, ce, kl, zero) -> str:
    named = (("CE", ce), ("KL", kl), ("CE zero", zero))
    return ", ".join(
        f"{name} {published_figure(paper, key)}" for name, key in named if key and published_figure(paper, key)
    )
