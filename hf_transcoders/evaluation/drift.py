"""Measure how far a fine-tuned language model has drifted, by the features of transcoders of the original model.

The same tokens are run before and after, so every comparison is paired. The uncertainty of a difference is estimated by
leaving out one group of blocks after another (the jackknife), which makes no assumption about correlations between tokens
of one text.
"""

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from ..data.token_blocks import TokenBlocks
from ..dictionaries import named_dictionaries
from ..errors import TranscoderError
from ..features.top_activations import TopActivations, find_top_activations
from ..files import atomic_file
from ..lm.architectures import locate
from ..lm.modes import in_eval_mode
from ..lm.partial_forward import final_hidden_states, logits_of
from ..lm.wrappers import in_own_precision, language_model
from ..models.modeling_transcoder import TranscoderModel
from ..models.transcoder_set import TranscoderSet
from ..text import logging
from ..text.printable import printable
from ..text.strict_json import to_json
from .baseline_file import check_tensors, read_facts
from .evaluation_report import TOGETHER, format_number
from .evaluator import ORIGINAL, TranscoderEvaluator
from .feature_changes import (
    FALSE_DISCOVERY_RATE,
    MIN_FIRINGS,
    TOLERANCE,
    FeatureChange,
    FeatureChanges,
    discoveries,
)
from .statistics import LossStatistics, NextTokenComparison


logger = logging.get_logger(__name__)

# Largest number of groups of blocks for the jackknife.
_MAX_GROUPS = 32
# Top activations of a feature in its label.
_LABEL_CONTEXTS = 3
_RECONSTRUCTION_METRICS = ("fvu", "normalized_mse")


@dataclass
class DriftReport:
    """
    Result of a [`DriftProbe`].

    Args:
        dictionaries (`dict[str, dict[str, float]]`):
            Metrics of each original dictionary on the current model: `fvu`, `normalized_mse`, `l0`; `ce_spliced`, the
            cross-entropy with the reconstruction in place of the true output; `kl_spliced`, the divergence of the
            predictions under this replacement; and `features_changed`, the share of features whose firing rate or mean
            activation has changed by more than 10%, beyond chance (features that fire less than 20 times, before and
            after together, are not judged: more probe text judges more of them).
        model (`dict[str, float]`):
            Metrics of the current model: `ce`, its cross-entropy; `kl`, the mean KL divergence of its predictions from
            those at the baseline, in nats; and `top1_agreement` with them.
        together (`dict[str, float]`, *optional*): `ce_spliced` and `kl_spliced` with all dictionaries spliced in at once.
        changed (`list[FeatureChange]`): Features that changed most, by the lower confidence bound of the change.
        protocol (`dict`): Model, tokens and precision, as in [`EvaluationReport`], and thresholds of changed features.
    """

    dictionaries: dict[str, dict[str, float]]
    model: dict[str, float]
    together: dict[str, float] | None = None
    changed: list[FeatureChange] = field(default_factory=list)
    protocol: dict[str, Any] = field(default_factory=dict)

    def scalars(self, prefix: str = "probe/") -> dict[str, float]:
        """All metrics in one `dict`: `probe/<dictionary>/fvu`, `probe/ce`, `probe/together/ce_spliced` ..."""
        groups = {f"{name}/": values for name, values in self.dictionaries.items()}
        groups |= {"": self.model, "together/": self.together or {}}
        return {f"{prefix}{group}{name}": value for group, values in groups.items() for name, value in values.items()}

    def to_dict(self) -> dict[str, Any]:
        """The report as plain values."""
        return asdict(self)

    def to_text(self) -> str:
        """The metrics and the features that changed most, as text for a terminal."""
        lines = [f"model: {_facts(self.model)}"]
        lines += [f"{name}: {_facts(values)}" for name, values in self.dictionaries.items()]
        if self.together is not None:
            lines.append(f"{TOGETHER}: {_facts(self.together)}")
        if self.changed:
            lines += ["", "rate before -> after    log-odds        mean before -> after  log-mean        feature"]
        for change in self.changed:
            lines.append(
                f"{change.rate_before:8.3%} -> {change.rate_after:8.3%}  {change.log_odds_change:+6.2f} ± "
                f"{change.log_odds_error:4.2f}  {format_number(change.mean_before):>8} -> "
                f"{format_number(change.mean_after):>8}  {change.log_mean_change:+6.2f} ± {change.log_mean_error:4.2f}  "
                f"{change.dictionary} {change.feature}: {change.description}"
            )
        return "\n".join(map(printable, lines))

    __str__ = to_text


class DriftProbe:
    """
    Measures the drift of a language model from a baseline.

    Everything is computed in the precision of the model's weights, in eval mode and without gradients, and the model is
    left unchanged. The same model gives the same metrics and no changed features.

    Args:
        transcoders ([`TranscoderModel`], [`TranscoderSet`], a mapping from name to dictionary, or a list):
            Dictionaries trained on the model before it changes.
        dataset (`Iterable[Mapping]`):
            Probe text: rows with `input_ids` and, if they are padded, `attention_mask`, as for [`TranscoderEvaluator`].
        tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            Tokenizer that decodes tokens for the labels of features. Without it features have no labels.
        num_features (`int`, *optional*, defaults to 20):
            Number of changed features in a report.
        max_tokens (`int`, *optional*, defaults to 16,384):
            Number of tokens for fidelity and features.
        max_loss_tokens (`int`, *optional*, defaults to 4,096):
            Number of tokens for cross-entropies, which cost part of a forward pass for each dictionary.
        max_kl_tokens (`int`, *optional*, defaults to 256):
            Number of tokens whose logits at the baseline are kept, `vocab_size` numbers each. 0 leaves out `kl` and
            `top1_agreement`.
        batch_size (`int`, *optional*, defaults to 8):
            Number of blocks per forward pass.
        skip_first (`int`, *optional*, defaults to 1):
            Number of tokens at the start of every block that are left out, as in [`TranscoderEvaluator`].
        special_token_ids (`Sequence[int]`, *optional*):
            Tokens that are left out everywhere.

    Example:

    ```python
    >>> probe = DriftProbe(transcoders, pack_tokens(probe_texts, tokenizer), tokenizer=tokenizer)
    >>> probe.take_baseline(model)
    >>> finetune(model)
    >>> print(probe.measure(model))
    ```
    """

    def __init__(
        self,
        transcoders: TranscoderModel | TranscoderSet | Mapping[str, TranscoderModel] | Iterable[TranscoderModel],
        dataset: Iterable[Mapping],
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        num_features: int = 20,
        max_tokens: int = 16_384,
        max_loss_tokens: int = 4_096,
        max_kl_tokens: int = 256,
        batch_size: int = 8,
        skip_first: int = 1,
        special_token_ids: Sequence[int] | None = None,
    ):
        self.dictionaries = named_dictionaries(transcoders)
        if not self.dictionaries:
            raise TranscoderError("There is no dictionary to measure drift with: give at least one.")
        self.tokenizer = tokenizer
        self.num_features = num_features
        self.max_loss_tokens = max_loss_tokens
        self.max_kl_tokens = max_kl_tokens
        self.batch_size = batch_size
        self.blocks = TokenBlocks(
            dataset, max_tokens=max_tokens, skip_first=skip_first, special_token_ids=special_token_ids
        )
        if sum(bool(mask.any()) for mask in self.blocks.masks) < 2:
            raise TranscoderError(
                "The probe text is a single block, which cannot tell a change from chance: give at least two, or better a few "
                "dozen."
            )
        self.groups = self.blocks.split(_MAX_GROUPS)
        self.baseline: _Measurement | None = None

    def check(self, model: torch.nn.Module) -> None:
        """
        Raises a [`TranscoderError`] if the dictionaries do not fit the model.
        """
        model = language_model(model)
        self._evaluator(model).check(self.dictionaries)

    def take_baseline(self, model: torch.nn.Module) -> None:
        """
        Measures the baseline that later models are compared with.

        Args:
            model (`torch.nn.Module`): Language model, plain or wrapped by PEFT, data parallelism or `torch.compile`.

        Raises:
            [`TranscoderError`]: the dictionaries do not fit this model.
        """
        self.check(model)
        self.baseline = self._measure(language_model(model), first=True)
        for name, metrics in self.baseline.metrics.items():
            if metrics["fvu"] > 1:
                logger.warning(
                    f"Before any training '{name}' explains less of the probe text than its mean does (FVU "
                    f"{metrics['fvu']:.3g}): check that it belongs to this model."
                )

    def measure(self, model: torch.nn.Module) -> DriftReport:
        """
        Compares a model with the baseline.

        Args:
            model (`torch.nn.Module`): Same as in [`~DriftProbe.take_baseline`].

        Returns:
            [`DriftReport`]

        Raises:
            [`TranscoderError`]: there is no baseline yet, or an activation is not finite.
        """
        if self.baseline is None:
            raise TranscoderError("There is nothing to compare with: call `take_baseline` before the model changes.")
        return self._report(self._measure(language_model(model)))

    def baseline_report(self) -> DriftReport:
        """The report of the baseline compared with itself."""
        return self._report(self.baseline)

    # ---------------------------------------------------------------------------------------------------- measuring

    def _evaluator(self, model):
        return TranscoderEvaluator(
            model,
            self.blocks,
            batch_size=self.batch_size,
            max_loss_tokens=self.max_loss_tokens,
            progress=False,
        )

    @torch.no_grad()
    def _measure(self, model, first=False) -> "_Measurement":
        named = self.dictionaries
        evaluator = self._evaluator(model)
        together = len(named) > 1 and len({locate(model, d.config.output_site).place for d in named.values()}) == len(
            named
        )
        with in_own_precision(model), in_eval_mode(model, *named.values()):
            by_group = [evaluator.measure_fidelity(named, blocks) for blocks in self.groups]
            losses = evaluator.measure_losses(named, together=together)
            logits = self._kl_logits(model)
            top = {}
            if first and self.tokenizer is not None:
                top = find_top_activations(
                    model, named, self.blocks, num_contexts=_LABEL_CONTEXTS, batch_size=self.batch_size
                )
        fired, activation, metrics = {}, {}, {}
        for name in named:
            fired[name] = torch.stack([features[name].sums["fired"] for _, features in by_group]).cpu()
            activation[name] = torch.stack([features[name].sums["activation"] for _, features in by_group]).cpu()
            (reconstruction, features), *others = [(r[name], f[name]) for r, f in by_group]
            for other_reconstruction, other_features in others:
                reconstruction.merge(other_reconstruction)
                features.merge(other_features)
            fidelity = reconstruction.compute()
            metrics[name] = {
                **{metric: fidelity[metric] for metric in _RECONSTRUCTION_METRICS},
                "l0": features.compute()["l0"],
                **_spliced(losses, name),
            }
        protocol = evaluator.protocol(losses[ORIGINAL].tokens)
        del protocol["ablation"]
        return _Measurement(
            metrics=metrics,
            ce=losses[ORIGINAL].compute()["ce"],
            together=_spliced(losses, TOGETHER) if together else None,
            fired=fired,
            activation=activation,
            kl_logits=logits,
            top_activations=top,
            protocol=protocol,
        )

    def _kl_blocks(self):
        return self.blocks.first(self.max_kl_tokens) if self.max_kl_tokens else None

    def _kl_logits(self, model) -> list[Tensor]:
        """Logits `(tokens, vocab_size)` of a few blocks each, in the order of the blocks."""
        if self.max_kl_tokens == 0:
            return []
        blocks = self._kl_blocks()
        logits = [torch.empty(0)] * len(blocks.texts)
        for batch in blocks.batches(model, self.batch_size):
            rows = final_hidden_states(model, **batch.inputs)[:, :-1][batch.predicting]
            parts = logits_of(model, rows).float().cpu().split(batch.predicting.sum(1).tolist())
            for number, part in zip(batch.numbers, parts, strict=True):
                logits[number] = part
        # In batches of blocks, as in files of earlier versions, which remain readable.
        chunks = [logits[start : start + self.batch_size] for start in range(0, len(logits), self.batch_size)]
        return [torch.cat([part for part in chunk if len(part)]) for chunk in chunks if any(map(len, chunk))]

    # ---------------------------------------------------------------------------------------------------- comparing

    def _report(self, now: "_Measurement") -> DriftReport:
        before = self.baseline
        tokens = torch.tensor([group.tokens for group in self.groups], dtype=torch.float64)
        changes = {
            name: FeatureChanges(
                tokens, before.fired[name], before.activation[name], now.fired[name], now.activation[name]
            )
            for name in self.dictionaries
        }
        significant = discoveries({name: change.p_values() for name, change in changes.items()})
        dictionaries = {
            name: {**now.metrics[name], "features_changed": significant[name].double().mean().item()}
            for name in self.dictionaries
        }
        return DriftReport(
            dictionaries=dictionaries,
            model={"ce": now.ce, **self._divergence(now)},
            together=now.together,
            changed=self._name_changes(changes, significant),
            protocol={
                **now.protocol,
                "kl_tokens": sum(map(len, before.kl_logits)),
                "groups": len(self.groups),
                "false_discovery_rate": FALSE_DISCOVERY_RATE,
                "min_firings": MIN_FIRINGS,
                "tolerance": TOLERANCE,
            },
        )

    def _divergence(self, now) -> dict[str, float]:
        if not now.kl_logits:
            return {}
        statistics = LossStatistics()
        blocks = self._kl_blocks()
        labels = torch.cat([text[1:][mask[:-1]] for text, mask in zip(blocks.texts, blocks.masks, strict=True)]).split(
            [len(logits) for logits in now.kl_logits]
        )
        for old, new, its_labels in zip(self.baseline.kl_logits, now.kl_logits, labels, strict=True):
            if old.shape != new.shape:
                raise TranscoderError(
                    f"The baseline has predictions over {old.shape[-1]} tokens and this model over {new.shape[-1]}: compare "
                    "models with the same vocabulary."
                )
            statistics.update(*NextTokenComparison(old, its_labels)(new))
        computed = statistics.compute()
        return {name: computed[name] for name in ("kl", "top1_agreement")}

    def _name_changes(self, changes, significant) -> list[FeatureChange]:
        candidates = [
            (-size, name, feature)
            for name, change in changes.items()
            for feature, size in zip(
                significant[name].nonzero().flatten().tolist(), change.sizes()[significant[name]].tolist(), strict=True
            )
        ]
        return [
            FeatureChange(
                dictionary=name, feature=feature, label=self._label(name, feature), **changes[name].facts(feature)
            )
            for _, name, feature in sorted(candidates)[: self.num_features]
        ]

    def _label(self, name, feature):
        if self.tokenizer is None or name not in self.baseline.top_activations:
            return None
        return self.baseline.top_activations[name].label(feature, self.blocks.texts, self.tokenizer)

    # ---------------------------------------------------------------------------------------------------- files

    def save_baseline(self, path: str | os.PathLike) -> None:
        """Writes the baseline to a safetensors file, to continue a run later with the same baseline."""
        tensors, metadata = self.baseline.to_tensors(self._input_ids())
        with atomic_file(path) as partial:
            save_file(tensors, partial, metadata)

    def _input_ids(self) -> Tensor:
        """Token ids of the probe text, `(blocks, longest)`, padded with -1."""
        return pad_sequence(self.blocks.texts, batch_first=True, padding_value=-1)

    def load_baseline(self, path: str | os.PathLike) -> None:
        """
        Reads a baseline written by [`~DriftProbe.save_baseline`].

        Raises:
            [`TranscoderError`]: the file is damaged, or of other dictionaries or other probe text.
        """
        sizes = {name: d.config.num_features for name, d in self.dictionaries.items()}
        try:
            with safe_open(path, framework="pt") as file:
                facts = read_facts((file.metadata() or {}).get("facts", ""), str(path))
                tensors = {key: file.get_tensor(key) for key in file.keys()}
            found = {name: tensors[f"{name}/fired"].shape[-1] for name in facts["metrics"]}
            same_text = torch.equal(tensors["input_ids"], self._input_ids())
            if found == sizes and same_text:
                tokens = torch.tensor([group.tokens for group in self.groups])
                check_tensors(tensors, sizes, tokens, self._kl_rows(), self._input_ids())
        except Exception as error:
            raise TranscoderError(
                f"{path} cannot be read ({printable(error)[:300].rstrip('.')}): delete it to measure drift from the current "
                "model."
            ) from error
        if found != sizes or not same_text:
            raise TranscoderError(
                f"The baseline in {path} was taken with other transcoders or on other probe text: continue with the same "
                "ones, or start in a new folder."
            )
        self.baseline = _Measurement.from_tensors(facts, tensors)

    def _kl_rows(self) -> list[int]:
        """Number of compared predictions in each batch."""
        if self.max_kl_tokens == 0:
            return []
        counts = [int(mask[:-1].sum()) for mask in self._kl_blocks().masks]
        sums = [sum(counts[start : start + self.batch_size]) for start in range(0, len(counts), self.batch_size)]
        return [rows for rows in sums if rows]


def measure_drift(
    before: torch.nn.Module,
    after: torch.nn.Module,
    transcoders: TranscoderModel | TranscoderSet | Mapping[str, TranscoderModel] | Iterable[TranscoderModel],
    dataset: Iterable[Mapping],
    **kwargs,
) -> DriftReport:
    """
    Measures the drift between two models, by the features of transcoders of the first.

    Args:
        before, after (`torch.nn.Module`): Original and fine-tuned model.
        transcoders, dataset, kwargs: Same as in [`DriftProbe`].

    Returns:
        [`DriftReport`]

    Example:

    ```python
    >>> print(measure_drift(model, finetuned, transcoders, pack_tokens(texts, tokenizer), tokenizer=tokenizer))
    ```
    """
    probe = DriftProbe(transcoders, dataset, **kwargs)
    probe.take_baseline(before)
    return probe.measure(after)


@dataclass
class _Measurement:
    """Measurement of one model: metrics, and sums `(groups, num_features)` over the features of each dictionary."""

    metrics: dict[str, dict[str, float]]
    ce: float
    together: dict[str, float] | None
    fired: dict[str, Tensor]
    activation: dict[str, Tensor]
    kl_logits: list[Tensor]
    top_activations: dict[str, TopActivations]
    protocol: dict[str, Any]

    def to_tensors(self, input_ids: Tensor) -> tuple[dict[str, Tensor], dict[str, str]]:
        tensors = {"input_ids": input_ids.contiguous()}
        for name in self.fired:
            tensors |= {f"{name}/fired": self.fired[name], f"{name}/activation": self.activation[name]}
        for name, top in self.top_activations.items():
            tensors |= {f"{name}/peaks/{part}": getattr(top, part) for part in ("values", "rows", "positions")}
        tensors |= {f"kl_logits/{i:05d}": logits for i, logits in enumerate(self.kl_logits)}
        facts = {key: getattr(self, key) for key in ("metrics", "ce", "together", "protocol")}
        return tensors, {"facts": to_json(facts, indent=None)}

    @classmethod
    def from_tensors(cls, facts: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> "_Measurement":
        names = list(facts["metrics"])
        return cls(
            **facts,
            fired={name: tensors[f"{name}/fired"] for name in names},
            activation={name: tensors[f"{name}/activation"] for name in names},
            kl_logits=[tensors[key] for key in sorted(tensors) if key.startswith("kl_logits/")],
            top_activations={
                name: TopActivations(*(tensors[f"{name}/peaks/{part}"] for part in ("values", "rows", "positions")))
                for name in names
                if f"{name}/peaks/values" in tensors
            },
        )


def _spliced(losses, name) -> dict[str, float]:
    spliced = losses[("spliced", name)].compute()
    return {"ce_spliced": spliced["ce"], "kl_spliced": spliced["kl"]}


def _facts(values):
    return ", ".join(f"{name} {format_number(value)}" for name, value in values.items())
