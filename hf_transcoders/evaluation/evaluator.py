"""Evaluate dictionaries inside their language model."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ..data.text import hub_dataset_id
from ..data.token_blocks import TokenBlocks
from ..dictionaries import check_fits, named_dictionaries
from ..errors import TranscoderError
from ..lm.capture import capture
from ..lm.devices import input_device
from ..lm.forwards import check_head
from ..lm.modes import in_eval_mode
from ..lm.partial_forward import (
    block_of,
    final_hidden_states,
    logits_of,
    record_block_outputs,
    restart_at,
    runs_head_apart,
    vocabulary_size,
)
from ..lm.replace import ablate, replace, writers_by_site
from ..lm.sites import Site, input_site
from ..lm.wrappers import language_model
from ..models.modeling_transcoder import TranscoderModel
from ..models.transcoder_set import TranscoderSet
from ..text import logging
from ..text.printable import printable
from ..version import versions
from .evaluation_report import TOGETHER, EvaluationReport
from .statistics import (
    FeatureStatistics,
    LossStatistics,
    NextTokenComparison,
    ReconstructionStatistics,
    ce_recovered,
    density_histogram,
)


logger = logging.get_logger(__name__)

# Elements of the largest temporaries: features of some tokens, logits of some positions.
_MAX_ELEMENTS = 2**23

# Tokens for fidelity, sparsity and dead features by default.
_MAX_TOKENS = 100_000

# Number of changed models whose final hidden states are kept until their losses are computed together.
_MAX_PENDING = 16

#: Key of the unchanged model among the losses.
ORIGINAL = ("original", "")


class TranscoderEvaluator:
    """Measures fidelity, sparsity and loss of dictionaries on a dataset of token blocks.

    Nothing is computed twice: one forward pass of the base model up to the last site serves the fidelity of all
    dictionaries and the means for mean-ablation; the losses of the unchanged and the ablated model are shared by
    dictionaries with the same output site; a changed model is run from the first block that the change can reach.

    Args:
        base_model ([`~transformers.PreTrainedModel`]):
            Causal language model.
        dataset (`Iterable[Mapping]`):
            Rows with `input_ids`, such as those of [`pack_tokens`], or padded rows with `attention_mask`, which give the same
            metrics as without padding (see [`read_row`]); or [`TokenBlocks`].
        batch_size (`int`, *optional*, defaults to 8):
            Number of blocks per forward pass.
        max_tokens (`int`, *optional*, defaults to 100,000):
            Number of tokens for fidelity, sparsity and dead features.
        max_loss_tokens (`int`, *optional*, defaults to 20,000):
            Number of tokens for losses, which cost a forward pass for each dictionary and ablation. At most `max_tokens` are
            used.
        skip_first (`int`, *optional*, defaults to 1):
            Number of tokens at the start of every block that are left out of all metrics and keep their true activation.
            Models use the first token as an attention sink, with activations hundreds of times the usual norm;
            a dictionary that was not trained on it should not be judged on it.
        special_token_ids (`Sequence[int]`, *optional*):
            Tokens that are left out everywhere in the same way.
        dataset_name, dataset_split (`str`, *optional*):
            Name and split of the data in the report. Defaults to those of a `datasets.Dataset`.
        progress (`bool`, *optional*, defaults to `True`):
            Whether to show progress bars.

    Example:

    ```python
    >>> evaluator = TranscoderEvaluator(model, held_out_blocks)
    >>> report = evaluator.evaluate(transcoders)
    >>> print(report)
    ```
    """

    def __init__(
        self,
        base_model: PreTrainedModel,
        dataset: Iterable[Mapping] | TokenBlocks,
        *,
        batch_size: int = 8,
        max_tokens: int | None = None,
        max_loss_tokens: int = 20_000,
        skip_first: int | None = None,
        special_token_ids: Sequence[int] | None = None,
        dataset_name: str | None = None,
        dataset_split: str | None = None,
        progress: bool = True,
    ):
        base_model = language_model(base_model)
        check_head(base_model)
        for name, value in (("batch_size", batch_size), ("max_loss_tokens", max_loss_tokens)):
            if value < 1:
                raise TranscoderError(f"`{name}` is {value}; give at least 1.")
        self.base_model = base_model
        self.batch_size = batch_size
        self.progress = progress
        if not isinstance(dataset, TokenBlocks):
            self.blocks = TokenBlocks(
                dataset,
                max_tokens=_MAX_TOKENS if max_tokens is None else max_tokens,
                skip_first=1 if skip_first is None else skip_first,
                special_token_ids=special_token_ids,
            )
        elif max_tokens is skip_first is special_token_ids is None:
            self.blocks = dataset
        else:
            raise TranscoderError(
                "`max_tokens`, `skip_first` and `special_token_ids` are those of the given `TokenBlocks`: leave them out."
            )
        self.loss_blocks = self.blocks.first(max_loss_tokens)
        known_name, known_split = _describe(dataset)
        self.dataset_name = dataset_name or known_name
        self.dataset_id = hub_dataset_id(dataset)
        self.dataset_split = dataset_split or known_split

    @torch.no_grad()
    def evaluate(
        self,
        dictionaries: TranscoderModel | TranscoderSet | Mapping[str, TranscoderModel] | Iterable[TranscoderModel],
        together: bool = False,
    ) -> EvaluationReport:
        """Evaluate dictionaries one by one and, optionally, all spliced in at once.

        Args:
            dictionaries ([`TranscoderModel`], [`TranscoderSet`], a mapping from name to dictionary, or a list):
                Dictionaries to evaluate.
            together (`bool`, *optional*, defaults to `False`):
                Whether to measure the losses with all dictionaries spliced in at once as well, each reading the residual
                stream that earlier ones have changed. No two of them may then write to the same site.

        Returns:
            [`EvaluationReport`]

        Raises:
            [`TranscoderError`]: a dictionary does not fit the base model, or an activation is not finite.
        """
        named = named_dictionaries(dictionaries)
        if not named:
            raise TranscoderError("There is no dictionary to evaluate: give at least one.")
        self.check(named, together)
        with in_eval_mode(self.base_model, *named.values()):
            reconstruction, features = self.measure_fidelity(named)
            means = {d.config.output_site: reconstruction[name].mean_target() for name, d in named.items()}
            losses = self.measure_losses(named, means, together)
        entries = {}
        for name, dictionary in named.items():
            site = dictionary.config.output_site
            metrics = {
                **features[name].compute(),
                **reconstruction[name].compute(),
                **_loss_metrics(losses, name, site),
            }
            entries[name] = {
                "metrics": metrics,
                "density_histogram": density_histogram(features[name].density()),
                "config": {
                    key: getattr(dictionary.config, key)
                    for key in ("input_site", "output_site", "num_features", "activation", "k")
                },
            }
        report = EvaluationReport(
            dictionaries=entries,
            protocol=self.protocol(losses[ORIGINAL].tokens),
            together=_loss_metrics(losses, TOGETHER, TOGETHER) if together else None,
        )
        for text in report.warnings:
            logger.warning(text)
        return report

    # -------------------------------------------------------------------------------------------------- fidelity

    @torch.no_grad()
    def measure_fidelity(
        self, named: Mapping[str, TranscoderModel], blocks: TokenBlocks | None = None
    ) -> tuple[dict[str, ReconstructionStatistics], dict[str, FeatureStatistics]]:
        """Measure the statistics of fidelity and sparsity, on the same forward passes for all dictionaries.

        Args:
            named (`Mapping[str, TranscoderModel]`): Dictionaries by name, which run in evaluation mode.
            blocks ([`TokenBlocks`], *optional*): Blocks to measure on. Defaults to all blocks of the evaluator.

        Returns:
            `tuple[dict[str, ReconstructionStatistics], dict[str, FeatureStatistics]]`: both by dictionary.
        """
        device = input_device(self.base_model)
        reconstruction = {name: ReconstructionStatistics(d.config.d_out, d.device) for name, d in named.items()}
        features = {name: FeatureStatistics(d.config.num_features, d.device) for name, d in named.items()}
        sites = {site for d in named.values() for site in (d.config.input_site, d.config.output_site)}
        groups = _groups(named)
        with in_eval_mode(self.base_model, *named.values()), capture(self.base_model, sites) as activations:
            for batch in self._progress(blocks or self.blocks, "fidelity"):
                self.base_model(**batch.inputs)
                values = {site: activations.of_tokens(site, batch.input_ids.shape) for site in sites}
                values = {site: value[batch.mask.to(value.device)] for site, value in values.items()}
                for site, rows in values.items():
                    if not rows.isfinite().all():
                        raise TranscoderError(
                            f"The activations at '{site}' are not all finite on {device}: run the base model in "
                            "bfloat16 or float32, and check that it was loaded completely."
                        )
                for together in groups:
                    self._update_fidelity(together, values, reconstruction, features)
        return reconstruction, features

    @staticmethod
    def _update_fidelity(together, values, reconstruction, features):
        """Add one batch to the statistics of dictionaries that write at one site, whose sum is the reconstruction there."""
        rows = max(1, _MAX_ELEMENTS // max(dictionary.config.num_features for dictionary in together.values()))
        tokens = len(next(iter(values.values())))
        for start in range(0, tokens, rows):
            some = slice(start, start + rows)
            written: dict[str, torch.Tensor] = {}
            for name, dictionary in together.items():
                sparse = dictionary.config.activation == "topk"
                inputs = values[dictionary.config.input_site][some].to(dictionary.device)
                output = dictionary(inputs, output_features=not sparse)
                if sparse:
                    features[name].update(output.feature_values, output.feature_indices)
                else:
                    features[name].update(output.features)
                parts = output.reconstruction
                if not isinstance(parts, Mapping):
                    parts = {dictionary.config.output_site: parts}
                for site, part in parts.items():
                    written[site] = written[site] + part if site in written else part
            for name, dictionary in together.items():
                targets = values[dictionary.config.output_site][some].to(dictionary.device)
                reconstruction[name].update(targets, written[dictionary.config.output_site])

    # ---------------------------------------------------------------------------------------------------- losses

    def _variants(self, named, means, together):
        """The changes to the base model whose losses are measured."""
        model = self.base_model
        variants = []
        for site, mean in means.items():
            start = block_of(model, site)
            variants.append(_Variant(("zero", str(site)), start, lambda mask, s=site: ablate(model, s, mask=mask)))
            variants.append(
                _Variant(("mean", str(site)), start, lambda mask, s=site, m=mean: ablate(model, s, m, mask=mask))
            )
        # All that write at the own site of each dictionary: itself, or layers of its cross-layer transcoder.
        writers = {
            name: at_site[d.config.output_site]
            for group in _groups(named)
            for at_site in [writers_by_site(group.values())]
            for name, d in group.items()
        }
        for name, d in named.items():
            at_site = {d.config.output_site: writers[name]}
            first = min(block_of(model, input_site(writer)) for writer in writers[name])
            variants.append(
                _Variant(
                    ("spliced", name),
                    min(first, block_of(model, d.config.output_site)),
                    lambda mask, at_site=at_site: replace(model, at_site, mask=mask),
                )
            )
        starts = {variant.key[1]: variant.start for variant in variants if variant.key[0] == "spliced"}
        groups = {TOGETHER: list(named)} if together is True else together or {}
        for group, names in groups.items():
            by_site = {named[name].config.output_site: writers[name] for name in names}
            changes = {"spliced": lambda mask, by_site=by_site: replace(model, by_site, mask=mask)}
            if means:
                sites = [named[name].config.output_site for name in names]
                changes["zero"] = lambda mask, sites=sites: ablate(model, sites, mask=mask)
                changes["mean"] = lambda mask, sites=sites: ablate(model, sites, means, mask=mask)
            start = min(starts[name] for name in names)
            variants += [_Variant((kind, group), start, change) for kind, change in changes.items()]
        return variants

    @torch.no_grad()
    def measure_losses(
        self,
        named: Mapping[str, TranscoderModel],
        means: Mapping[Site, torch.Tensor] | Mapping[str, torch.Tensor] | None = None,
        together: bool | Mapping[str, Sequence[str]] = False,
    ) -> dict[tuple[str, str], LossStatistics]:
        """Measure the losses of the unchanged model and of the model with each dictionary spliced in or ablated.

        Args:
            named (`Mapping[str, TranscoderModel]`): Dictionaries by name, which run in evaluation mode.
            means (`Mapping[Site, torch.Tensor]` or `Mapping[str, torch.Tensor]`, *optional*):
                Mean `(d_out,)` at each output site. Without means nothing is ablated.
            together (`bool` or `Mapping[str, Sequence[str]]`, *optional*, defaults to `False`):
                Whether to splice in all dictionaries at once as well, or several groups of them: name of a group -> its
                dictionaries, no two of which write to the same site.

        Returns:
            `dict[tuple[str, str], LossStatistics]`: under `("original", "")`, `("spliced", <dictionary>)`,
            `("zero", <output site>)` and `("mean", <output site>)`, and under `("spliced", <group>)`, `("zero", <group>)`
            and `("mean", <group>)`, where the group of every dictionary is `"all together"`.
        """
        with in_eval_mode(self.base_model, *named.values()):
            return self._measure(self._variants(named, means or {}, together))

    @torch.no_grad()
    def measure_changes(
        self, changes: Mapping[str, Callable[[torch.Tensor], AbstractContextManager]], first_block: int = 0
    ) -> dict[str, LossStatistics]:
        """Measure the losses of the model under arbitrary changes.

        Args:
            changes (`Mapping[str, Callable]`):
                Name -> function that takes the mask `(batch, seq)` of the positions that count and returns a context
                manager in which the base model is changed. The name "original" is reserved.
            first_block (`int`, *optional*, defaults to 0):
                First block that a change can reach or read; earlier blocks are not run again.

        Returns:
            `dict[str, LossStatistics]`: statistics by name, and those of the unchanged model under "original".
        """
        variants = [_Variant(("changed", name), first_block, change) for name, change in changes.items()]
        with in_eval_mode(self.base_model):
            losses = self._measure(variants)
        return {key[1] or key[0]: statistics for key, statistics in losses.items()}

    def _measure(self, variants):
        model = self.base_model
        losses = {
            key: LossStatistics(input_device(model)) for key in [ORIGINAL, *(variant.key for variant in variants)]
        }
        for batch in self._progress(self.loss_blocks, "losses"):
            counted, labels = batch.predicting, batch.labels
            with record_block_outputs(model, {variant.start - 1 for variant in variants if variant.start}) as below:
                original = final_hidden_states(model, **batch.inputs)[:, :-1][counted]
            pending = {ORIGINAL: original}
            # Logits are many times wider than hidden states.
            most = _MAX_PENDING if runs_head_apart(model, batch.input_ids) else 1
            for variant in variants:
                with ExitStack() as stack:
                    if variant.start:
                        stack.enter_context(restart_at(model, variant.start, below[variant.start - 1]))
                    stack.enter_context(variant.change(batch.mask))
                    pending[variant.key] = final_hidden_states(model, **batch.inputs)[:, :-1][counted]
                if len(pending) >= most:
                    self._update_losses(losses, original, labels, pending)
                    pending = {}
            self._update_losses(losses, original, labels, pending)
        return losses

    def _update_losses(self, losses, original, labels, pending):
        """Update losses with the final hidden states of several models, a few positions at a time."""
        model = self.base_model
        positions = max(1, _MAX_ELEMENTS // vocabulary_size(model))
        for start in range(0, len(labels) if pending else 0, positions):
            part = slice(start, start + positions)
            compare = NextTokenComparison(logits_of(model, original[part]), labels[part])
            for key, rows in pending.items():
                losses[key].update(*compare(logits_of(model, rows[part])))

    # ----------------------------------------------------------------------------------------------------- around

    def check(self, named: Mapping[str, TranscoderModel], together: bool = False) -> None:
        """Raise a [`TranscoderError`] if a dictionary does not fit the base model, or two of them write to the same site."""
        check_fits(self.base_model, named)
        sites = {}
        for name, dictionary in named.items():
            if together and (other := sites.setdefault(dictionary.config.output_site, name)) != name:
                raise TranscoderError(
                    f"'{other}' and '{name}' both write to '{dictionary.config.output_site}', so they cannot be spliced in "
                    "together: leave one of them out."
                )

    def _progress(self, blocks, what):
        batches = blocks.batches(self.base_model, self.batch_size)
        return tqdm(
            batches, desc=printable(what), total=-(-len(blocks.texts) // self.batch_size), disable=not self.progress
        )

    def protocol(self, loss_tokens: int) -> dict[str, Any]:
        """The protocol of an [`EvaluationReport`]."""
        config = self.base_model.config
        bos = getattr(config.get_text_config(), "bos_token_id", None)
        texts = [text for text in self.blocks.texts if len(text)]
        lengths = list(map(len, texts))
        return {
            "base_model": config.name_or_path or None,
            "base_model_revision": getattr(config, "_commit_hash", None),
            "dataset": self.dataset_name,
            "dataset_id": self.dataset_id,
            "dataset_split": self.dataset_split,
            "fidelity_tokens": self.blocks.tokens,
            "loss_tokens": loss_tokens,
            "sequence_length": max(lengths),
            **({"shortest_sequence": min(lengths)} if min(lengths) != max(lengths) else {}),
            "begins_with_bos": bos is not None and all(int(text[0]) == bos for text in texts),
            "skip_first": self.blocks.skip_first,
            "special_token_ids": self.blocks.special_token_ids,
            "ablation": "output set to zero, and to its mean over the fidelity tokens",
            "dtype": str(self.base_model.dtype).removeprefix("torch."),
            "device": input_device(self.base_model).type,
            "versions": versions(),
        }


@dataclass
class _Variant:
    """A change to the base model: the first block that it can reach, and a function that applies it to positions."""

    key: tuple[str, str]
    start: int
    change: Callable[[torch.Tensor], AbstractContextManager]


def _loss_metrics(losses, name, site):
    original = losses[ORIGINAL].compute()["ce"]
    spliced = losses[("spliced", name)].compute()
    zero, mean = (losses[(kind, site)].compute() for kind in ("zero", "mean"))
    return {
        "ce_original": original,
        "ce_spliced": spliced["ce"],
        "ce_zero_ablated": zero["ce"],
        "ce_mean_ablated": mean["ce"],
        "ce_recovered_zero": ce_recovered(original, spliced["ce"], zero["ce"]),
        "ce_recovered_mean": ce_recovered(original, spliced["ce"], mean["ce"]),
        **{
            f"{metric}{ending}": of[metric]
            for metric in ("kl", "top1_agreement")
            for ending, of in (("", spliced), ("_zero_ablated", zero), ("_mean_ablated", mean))
        },
    }


def _groups(named) -> list[dict[str, TranscoderModel]]:
    """Dictionaries that reconstruct together: the layers of a cross-layer transcoder; every other one is alone."""
    groups: dict[object, dict[str, TranscoderModel]] = {}
    for name, dictionary in named.items():
        groups.setdefault(name if dictionary.group is None else (dictionary.group,), {})[name] = dictionary
    return list(groups.values())


def _describe(dataset) -> tuple[str | None, str | None]:
    """Name and split of a `datasets.Dataset` or `IterableDataset`; `None` for other iterables."""
    if type(dataset).__module__.partition(".")[0] != "datasets":
        return None, None
    return dataset.info.dataset_name, str(dataset.split) if dataset.split else None
