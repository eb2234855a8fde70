"""What a model loses when transcoders take the place of its MLPs: each alone, and many layers at once."""

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
from ...lm.sites import Site
from ...models.modeling_transcoder import TranscoderModel
from ...models.transcoder_set import TranscoderSet
from ..published import REPLACEMENT, PublishedStudy, published_study


#: Groups of layers that are replaced at once, in the order of the table.
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
    One row of the table.

    Args:
        name (`str`): The dictionary, or the group of layers.
        layers (`list[int]`): Layers whose outputs are replaced.
        replaced, zero, mean (`Change`): With the dictionaries, with zero, and with the mean in their place.
        recovered_zero, recovered_mean (`float`): Share of the damage of each ablation that the dictionaries avoid.
        l0, fvu (`float`, *optional*): Of a single dictionary: active features, fraction of variance unexplained.
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
    The table of whole-model replacement.

    Args:
        ce_original (`float`): Cross-entropy of the unchanged model.
        dictionaries (`list[ReplacedLayers]`): Each dictionary alone, from the first layer to the last.
        groups (`list[ReplacedLayers]`): Many layers at once.
        num_layers (`int`): Layers of the model.
        protocol (`dict`): How it was measured, as [`EvaluationReport`] has it.
        published ([`PublishedStudy`], *optional*): Figures of the paper, if they are of this model and its transcoders.
    """

    ce_original: float
    dictionaries: list[ReplacedLayers]
    groups: list[ReplacedLayers]
    num_layers: int
    protocol: dict[str, Any]
    published: PublishedStudy | None = None

    def protocol_lines(self) -> dict[str, str]:
        """The protocol as readable facts."""
        return EvaluationReport({}, self.protocol).protocol_lines()

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON."""
        return asdict(self)


@torch.no_grad()
def replacement_study(
    evaluator: TranscoderEvaluator,
    dictionaries: TranscoderModel | TranscoderSet | Mapping[str, TranscoderModel] | Iterable[TranscoderModel],
    *,
    transcoders_name: str | None = None,
) -> ReplacementStudy:
    """
    Cross-entropy, KL and top-1 agreement with dictionaries in place of a model's own outputs: each layer alone, all that
    there are, and all but the last and but the first and last layer; against zero- and mean-ablation of the same layers.

    Args:
        evaluator ([`TranscoderEvaluator`]): The model and the text.
        dictionaries ([`TranscoderModel`], [`TranscoderSet`], a mapping from name to dictionary, or a list):
            What to put in place; no two may write to one site, and each must write to a layer.
        transcoders_name (`str`, *optional*): Repo or folder that they come from.

    Returns:
        [`ReplacementStudy`]

    Raises:
        [`TranscoderError`]: a dictionary does not fit the model, or two write to one site.

    Source: Dunefsky, Chlenski and Nanda (2024), arXiv 2406.11944, which replaces all MLPs of GPT-2 small.
    """
    model = evaluator.base_model
    named = named_dictionaries(dictionaries)
    evaluator.check(named, together=True)
    outputs = {name: Site.parse(dictionary.config.output_site) for name, dictionary in named.items()}
    if outside := [name for name, site in outputs.items() if site.layer is None]:
        raise TranscoderError(f"'{outside[0]}' writes '{outputs[outside[0]]}', which is of no layer: leave it out.")
    named = dict(sorted(named.items(), key=lambda item: outputs[item[0]].layer))  # pyright: ignore[reportCallIssue]
    last = num_layers(model) - 1
    groups = {
        ALL: list(named),
        ALL_BUT_LAST: [name for name in named if outputs[name].layer != last],
        INNER: [name for name in named if outputs[name].layer not in (0, last)],
    }
    # A part of a set may leave nothing out, or too little for a group.
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
