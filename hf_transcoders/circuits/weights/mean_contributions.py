"""Mean contributions of earlier features to a feature over text, with their input-invariant strengths."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from ...data.token_blocks import TokenBlocks
from ...lm.capture import capture
from ...lm.devices import input_device
from ...lm.modes import in_eval_mode
from ...lm.norms import norm_scale
from ...lm.sites import input_site, output_site
from ...lm.stream import norm_after, norm_before, stream_before
from ...models.modeling_transcoder import TranscoderModel
from .connections import MAX_ELEMENTS


@dataclass(frozen=True)
class SourceContributions:
    """The part of one dictionary in [`MeanContributions`].

    Args:
        strengths (`torch.Tensor` of shape `(num_features, targets)`): Input-invariant, as `connections` gives them.
        contributions (`torch.Tensor` of shape `(num_features, targets)`): Mean of what each feature added.
    """

    strengths: torch.Tensor
    contributions: torch.Tensor


@dataclass(frozen=True)
class MeanContributions:
    """Mean contributions over tokens of features of earlier dictionaries to the pre-activations of some features.

    The mean of `a_i(t) * (W_dec_i . W_enc_j)` with the norms frozen at the scale that they have at each token
    (arXiv 2406.11944, Eq. 7; the direct path at the same token, without attention).

    Args:
        target (`str`): The dictionary of the targets.
        features (`list[int]`): The targets.
        only_active (`bool`): Whether the mean is over the tokens on which the target is active, or over all.
        tokens (`list[int]`): How many tokens the mean of each target is over. With none, its contributions are NaN.
        sources (`dict[str, SourceContributions]`): By dictionary.
    """

    target: str
    features: list[int]
    only_active: bool
    tokens: list[int]
    sources: dict[str, SourceContributions]

    def top(self, feature: int, k: int = 10) -> list[dict[str, Any]]:
        """The `k` sources that contribute most to a target, by magnitude: `dictionary`, `feature`, `contribution`, `strength`."""
        column = self.features.index(feature)
        found = []
        for name, source in self.sources.items():
            contributions, strengths = source.contributions[:, column], source.strengths[:, column]
            best = contributions.abs().topk(min(k, len(contributions))).indices
            found += [
                {"dictionary": name, "feature": number, "contribution": contribution, "strength": strength}
                for number, contribution, strength in zip(
                    best.tolist(), contributions[best].tolist(), strengths[best].tolist(), strict=True
                )
            ]
        return sorted(found, key=lambda row: -abs(row["contribution"]))[:k]

    def to_dict(self, k: int = 10) -> dict[str, Any]:
        """The `k` largest contributions to each target, as plain values."""
        return {
            "target": self.target,
            "only_active": self.only_active,
            "features": [
                {"feature": feature, "tokens": tokens, "top": self.top(feature, k)}
                for feature, tokens in zip(self.features, self.tokens, strict=True)
            ],
        }


@torch.no_grad()
def mean_scaled_activations(
    base_model: PreTrainedModel,
    target: TranscoderModel,
    features: Sequence[int],
    sources: Mapping[str, TranscoderModel],
    blocks: TokenBlocks,
    *,
    only_active: bool,
    batch_size: int,
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Mean over tokens of each source's activation times the scales of the norms between it and the target.

    The scales do not depend on the source's direction, so that a mean contribution is this mean times the strength.

    Args:
        base_model ([`~transformers.PreTrainedModel`]): The language model.
        target ([`TranscoderModel`]), features (`Sequence[int]`): Where contributions go.
        sources (`Mapping[str, TranscoderModel]`): Where they come from.
        blocks ([`TokenBlocks`]): The text; only tokens that count are read.
        only_active (`bool`): Whether only tokens count on which the target is active.
        batch_size (`int`): Blocks of one forward pass.

    Returns:
        `tuple`: by source `(num_features, targets)` in fp64, and the number of tokens of each target.
    """
    into = input_site(target)
    stream, norm = stream_before(base_model, into), norm_before(base_model, into)
    ends = {name: (input_site(d), output_site(d)) for name, d in sources.items()}
    post_norms = {name: norm_after(base_model, out) for name, (_, out) in ends.items()}
    sites = {stream, into, *(read for read, _ in ends.values())}
    sites |= {ends[name][1] for name, post_norm in post_norms.items() if post_norm is not None}
    device = input_device(base_model)
    totals = {
        name: torch.zeros(d.config.num_features, len(features), dtype=torch.float64) for name, d in sources.items()
    }
    count = torch.zeros(len(features), dtype=torch.long)
    with in_eval_mode(base_model, target, *sources.values()), capture(base_model, sites) as activations:
        for batch in blocks.batches(base_model, batch_size):
            base_model(**batch.inputs)
            # (tokens, width) of the tokens that count.
            seen = {site: value[batch.mask] for site, value in activations.items()}
            weights = torch.ones(len(seen[stream]), len(features), device=device)
            if only_active:
                active = _encode(target, seen[into], device)
                weights = torch.cat([part[:, list(features)] > 0 for part in active]).float()
            count += weights.sum(0).long().cpu()
            if norm is not None:
                weights = weights * norm_scale(norm, seen[stream].float())
            for name, dictionary in sources.items():
                read, out = ends[name]
                scaled = weights
                if post_norms[name] is not None:
                    scaled = weights * norm_scale(post_norms[name], seen[out].float())
                start = 0
                for part in _encode(dictionary, seen[read], device):
                    totals[name] += (part.T @ scaled[start : start + len(part)]).double().cpu()
                    start += len(part)
    return {name: total / count for name, total in totals.items()}, count


def _encode(dictionary, inputs, device):
    """Features of `(tokens, d_in)`, some tokens at a time."""
    for rows in inputs.split(max(1, MAX_ELEMENTS // dictionary.config.num_features)):
        yield dictionary.encode(rows.to(dictionary.device)).float().to(device)
