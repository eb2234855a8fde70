"""How few features make a model predict what it predicts after a counterfactual prompt (Cunningham et al. 2023, Fig. 3)."""

from collections.abc import Mapping, Sequence

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ...circuits.patching.engine import PatchEngine
from ...dictionaries import fitting_dictionaries
from ...errors import TranscoderError
from ...lm.modes import in_eval_mode
from ...lm.wrappers import measures_model
from ...models.direction_dictionary import num_signed_directions
from ...models.modeling_transcoder import TranscoderModel
from ...tasks.performance import task_performance
from ...tasks.task import Task
from ...text.printable import printable
from .patched_features import CounterfactualKL, PatchedFeatures
from .patching_results import FeaturePatchingStudy, PatchedDictionary, PatchingCurve, PatchingPoint, patching_area
from .threshold_sweep import threshold_sweep


#: Thresholds of the sweep, in nats. The paper has 50 from 1e-5 to 1.
THRESHOLDS = (1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0)


@measures_model
@torch.no_grad()
def feature_patching_study(
    model: PreTrainedModel,
    task: Task,
    dictionaries: Mapping[str, TranscoderModel],
    *,
    thresholds: Sequence[float] = THRESHOLDS,
    random_orders: int = 1,
    single_signs: bool = False,
    group_size: int = 32,
    max_patched: int = 512,
    seed: int = 0,
    progress: bool = True,
) -> FeaturePatchingStudy:
    """
    Measure how many features must have their counterfactual activations for the counterfactual prediction.

    Activations of some features are set to those of the counterfactual prompt at every token, the error of the dictionary
    stays, and the next-token distribution is compared with that after the counterfactual prompt. Features are chosen by
    [`threshold_sweep`]: from all of them, those that hardly matter are removed, at ascending thresholds. Unlike in the code
    released with the paper, the size of the edit belongs to the set that is kept, and not to the last one that was tried.

    In a dictionary of [`direction_dictionary`] with both signs, such as principal components, the two signs of a direction are
    patched together, and with `single_signs` one by one as well.

    Args:
        model ([`~transformers.PreTrainedModel`]): A causal language model.
        task ([`Task`]): Prompts and counterfactual prompts, as those of IOI with the corruption `io_other`.
        dictionaries (`Mapping[str, TranscoderModel]`):
            Dictionaries by name. SAEs and transcoders, each with one output site.
        thresholds (`Sequence[float]`, *optional*): Thresholds in nats for each feature, ascending. From 1e-3 to 1 by default.
        random_orders (`int`, *optional*, defaults to 1):
            Number of random orders of visits, besides that by attribution, which tries the features first whose patch is
            estimated to change least.
        single_signs (`bool`, *optional*, defaults to `False`):
            Whether to patch the two signs of a direction one by one as well, as features of their own (`±`).
        group_size (`int`, *optional*, defaults to 32): Largest number of features that are tried together first; 1 tries each alone.
        max_patched (`int`, *optional*, defaults to 512): Limit of the area under the curve.
        seed (`int`, *optional*, defaults to 0): Seed of the random orders.
        progress (`bool`, *optional*, defaults to `True`): Whether to show a progress bar.

    Returns:
        [`FeaturePatchingStudy`]

    Raises:
        [`TranscoderError`]: a dictionary does not fit the model, or the task has no counterfactual prompts of equal length.

    Source: Cunningham, Ewart, Riggs, Huben and Sharkey (2023), arXiv 2309.08600, section 4 and Fig. 3.
    """
    if list(thresholds) != sorted(thresholds) or not thresholds or min(thresholds) < 0:
        raise TranscoderError("`thresholds` must be at least one number, ascending and not negative.")
    if group_size < 1:
        raise TranscoderError(f"group_size is {group_size}; give at least 1.")
    named = fitting_dictionaries(model, dictionaries)
    for name, dictionary in named.items():
        if len(dictionary.config.output_sites) != 1:
            raise TranscoderError(
                f"'{name}' writes at several sites: leave it out, or make transcoders of single layers."
            )
    performance = task_performance(model, task)
    engine = PatchEngine(model, task, metric=CounterfactualKL(model, task))
    found = []
    with in_eval_mode(*named.values()), tqdm(unit="set", disable=not progress) as bar:
        for name, dictionary in named.items():
            signed = num_signed_directions(dictionary) is not None
            for pairs in _units(signed, single_signs):
                patched = PatchedFeatures(engine, dictionary, pairs)
                orders = _orders(patched, random_orders, seed)
                label = f"± {name}" if signed and not pairs else name
                bar.set_description(f"patching {printable(label)}")
                found.append(_measured(label, patched, orders, thresholds, group_size, max_patched, bar))
    protocol = {
        **engine.protocol(),
        "thresholds": ", ".join(f"{threshold:g}" for threshold in thresholds) + " nats",
        "tried together": group_size,
        "random orders": random_orders,
        "seed": seed,
    }
    return FeaturePatchingStudy(found, max_patched, protocol, performance.warning)


def _units(signed: bool, single_signs: bool) -> list[bool]:
    """Whether the signs of a direction are patched together, for each measurement of a dictionary."""
    return [True, False][: 1 + single_signs] if signed else [False]


def _orders(patched: PatchedFeatures, random_orders: int, seed: int) -> dict[str, torch.Tensor]:
    """Orders of visits by name."""
    orders = {"attribution": patched.attribution().abs().argsort(stable=True)}
    for number in range(seed, seed + random_orders):
        generator = torch.Generator().manual_seed(number)
        orders[f"random, seed {number}"] = torch.randperm(len(patched.changes.rows), generator=generator)
    return orders


def _measured(name, patched: PatchedFeatures, orders, thresholds, group_size, max_patched, bar) -> PatchedDictionary:
    changes = patched.changes
    none = torch.zeros(1, len(changes.rows), dtype=torch.bool)
    kl_none = patched.kl(none).item()
    curves = []

    def measure(kept):
        bar.update(len(kept))
        return patched.kl(kept)

    for order, visits in orders.items():
        before = patched.measured
        path = threshold_sweep(measure, visits, thresholds, group_size)
        points = [PatchingPoint(each.size, each.kl, changes.edit_size(each.kept), each.threshold) for each in path]
        if points[-1].patched:
            points.append(PatchingPoint(0, kl_none, 0.0))
        curves.append(PatchingCurve(order, points, patching_area(points, max_patched), patched.measured - before))
    return PatchedDictionary(
        name=name,
        site=str(patched.site),
        num_units=changes.num_units,
        num_changing=len(changes.rows),
        kl_none=kl_none,
        kl_all=curves[0].points[0].kl,
        curves=curves,
    )
