"""Sufficient statistics of all metrics, and the metrics computed from them.

Each accumulator keeps only sums over tokens, in one `dict` of float64 tensors: adding two accumulators, or all-reducing
their sums over a process group, gives the statistics of all tokens together. `update` never waits for the device; `compute`
waits once.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from ..errors import TranscoderError


class SumStatistics:
    """Sums over tokens that can be merged.

    Args:
        shapes (`dict[str, tuple[int, ...]]`):
            Name and shape of every sum. `tokens`, the number of tokens seen, is added.
        device (`torch.device`, *optional*):
            Device of the sums and of the tensors given to `update`.

    Attributes:
        sums (`dict[str, torch.Tensor]`):
            The whole state, in which every entry is additive.
    """

    def __init__(self, shapes: dict[str, tuple[int, ...]], device: torch.device | str | None = None):
        # Apple's GPUs have no float64.
        dtype = torch.float32 if torch.device(device or "cpu").type == "mps" else torch.float64
        self.sums = {
            name: torch.zeros(shape, dtype=dtype, device=device) for name, shape in {"tokens": (), **shapes}.items()
        }

    @property
    def tokens(self) -> int:
        """Number of tokens seen (waits for the device)."""
        return int(self.sums["tokens"].item())

    def merge(self, other: SumStatistics) -> SumStatistics:
        """Add the tokens seen by `other` to this accumulator, in place, and return it."""
        if type(other) is not type(self):
            raise TranscoderError(
                f"Cannot merge {type(other).__name__} into {type(self).__name__}; merge accumulators of one class."
            )
        for name, total in self.sums.items():
            if total.shape != other.sums[name].shape:
                raise TranscoderError(
                    f"Cannot merge statistics of {tuple(other.sums[name].shape)} `{name}` into {tuple(total.shape)}; "
                    "build both accumulators with the same size."
                )
        for name, total in self.sums.items():
            total += other.sums[name].to(total.device)
        return self

    def reset(self) -> None:
        """Reset all sums to zero, in place."""
        for total in self.sums.values():
            total.zero_()

    def _add(self, **terms: Tensor | int) -> None:
        for name, term in terms.items():
            self.sums[name] += term

    def _seen(self) -> dict[str, Tensor]:
        if self.tokens == 0:
            raise TranscoderError(f"{type(self).__name__} has seen no tokens; call `update` before `compute`.")
        return self.sums

    def _sum(self, values: Tensor) -> Tensor:
        return values.sum(dtype=self.sums["tokens"].dtype)


def _floats(values: dict[str, Tensor]) -> dict[str, float]:
    return dict(zip(values, torch.stack(list(values.values())).tolist(), strict=True))


class ReconstructionStatistics(SumStatistics):
    r"""Fidelity of reconstructions to their targets.

    With target \\(y\\), reconstruction \\(\hat y\\), \\(T\\) tokens of width \\(d\\) and \\(\bar y\\) the mean target
    over all \\(T\\) tokens, `compute` gives

    - `mse`: \\(\sum_t \|y_t - \hat y_t\|^2 / (T d)\\), the mean over elements;
    - `normalized_mse`: \\(\sum_t \|y_t - \hat y_t\|^2 / \sum_t \|y_t\|^2\\);
    - `fvu`, the fraction of variance unexplained: \\(\sum_t \|y_t - \hat y_t\|^2 / \sum_t \|y_t - \bar y\|^2\\);
    - `explained_variance`: \\(1 - \mathrm{fvu}\\);
    - `cosine`: the mean over tokens of \\(\cos(y_t, \hat y_t)\\);
    - `l2_ratio`: the mean over tokens of \\(\|\hat y_t\| / \|y_t\|\\), below 1 under shrinkage;
    - `relative_reconstruction_bias`: \\(\sum_t \|\hat y_t\|^2 / \sum_t y_t \cdot \hat y_t\\), 1 when unbiased
      (Rajamanoharan et al. 2024, "Improving Dictionary Learning with Gated Sparse Autoencoders", eq. 10).

    A token whose target or reconstruction is the zero vector counts as cosine 0; one whose target is zero counts as
    ratio 0.

    Args:
        d_out (`int`):
            Width of the targets.
        device (`torch.device`, *optional*):
            Device of the sums.
    """

    def __init__(self, d_out: int, device: torch.device | str | None = None):
        super().__init__(
            {
                "target": (d_out,),
                "target_square": (),
                "error_square": (),
                "reconstruction_square": (),
                "product": (),
                "cosine": (),
                "l2_ratio": (),
            },
            device,
        )
        self.d_out = d_out

    @torch.no_grad()
    def update(self, target: Tensor, reconstruction: Tensor, mask: Tensor | None = None) -> None:
        """Add a batch.

        Args:
            target (`torch.Tensor` of shape `(..., d_out)`):
                Targets.
            reconstruction (`torch.Tensor` of shape `(..., d_out)`):
                Reconstructions of the targets.
            mask (`torch.BoolTensor` of shape `(...)`, *optional*):
                Tokens to count. All by default.
        """
        if target.shape != reconstruction.shape or target.shape[-1] != self.d_out:
            raise TranscoderError(
                f"Targets {tuple(target.shape)} and reconstructions {tuple(reconstruction.shape)} must have the same "
                f"shape and end in d_out = {self.d_out}."
            )
        # On a CPU, temporaries of 2 MB stay in the cache and in the allocator: twice as fast as one whole pass.
        rows = max(1, 2**19 // self.d_out) if target.device.type == "cpu" else max(1, target.numel())
        masks = mask.reshape(-1, 1).split(rows) if mask is not None else itertools.repeat(None)
        targets, reconstructions = target.reshape(-1, self.d_out), reconstruction.reshape(-1, self.d_out)
        for batch in zip(targets.split(rows), reconstructions.split(rows), masks, strict=False):
            self._update_rows(*batch)

    def _update_rows(self, target: Tensor, reconstruction: Tensor, keep: Tensor | None) -> None:
        target, reconstruction = target.float(), reconstruction.float()
        tokens = torch.full((), len(target), dtype=self.sums["tokens"].dtype, device=target.device)
        if keep is not None:
            tokens = self._sum(keep)
            target = target.where(keep, 0)
            reconstruction = reconstruction.where(keep, 0)

        # float32 sums of squares lose the variance under a large mean. So the squares are computed relative to a vector
        # near the mean (any vector gives the same result in exact arithmetic) and shifted back in float64.
        center = target[::16].mean(0) if keep is None else target.sum(0) / tokens.clamp(min=1).float()
        deviation = target - center
        if keep is not None:
            deviation = deviation.where(keep, 0)
        shift, center = deviation.sum(0).to(tokens.dtype), center.to(tokens.dtype)
        deviation_square = self._norms(deviation).square().sum()

        target_norm, reconstruction_norm = self._norms(target), self._norms(reconstruction)
        error_square = self._norms(target - reconstruction).square()
        # y . r from the three norms: no further pass over the data, and as exact unless the two are orthogonal.
        product = (target_norm.square() + reconstruction_norm.square() - error_square) / 2
        tiny = torch.finfo(torch.float32).tiny
        self._add(
            tokens=tokens,
            target=shift + tokens * center,
            target_square=deviation_square + (center * (2 * shift + tokens * center)).sum(),
            error_square=error_square.sum(),
            reconstruction_square=reconstruction_norm.square().sum(),
            product=product.sum(),
            cosine=(product / (target_norm * reconstruction_norm).clamp(min=tiny)).sum(),
            l2_ratio=(reconstruction_norm / target_norm).where(target_norm > 0, 0).sum(),
        )

    def _norms(self, rows: Tensor) -> Tensor:
        return torch.linalg.vector_norm(rows, dim=-1).to(self.sums["tokens"].dtype)

    def mean_target(self) -> Tensor:
        """The mean target `(d_out,)` in float64."""
        sums = self._seen()
        return sums["target"] / sums["tokens"]

    def compute(self) -> dict[str, float]:
        """The metrics of the class. The FVU of constant targets is `inf` (`nan` if the error is zero too)."""
        sums = self._seen()
        variance = (sums["target_square"] - sums["target"].square().sum() / sums["tokens"]).clamp(min=0)
        fvu = sums["error_square"] / variance
        return _floats(
            {
                "mse": sums["error_square"] / (sums["tokens"] * self.d_out),
                "normalized_mse": sums["error_square"] / sums["target_square"],
                "fvu": fvu,
                "explained_variance": 1 - fvu,
                "cosine": sums["cosine"] / sums["tokens"],
                "l2_ratio": sums["l2_ratio"] / sums["tokens"],
                "relative_reconstruction_bias": sums["reconstruction_square"] / sums["product"],
            }
        )


class FeatureStatistics(SumStatistics):
    r"""Sparsity and strength of feature activations.

    `compute` gives

    - `l0`: the mean over tokens of the number of features that are not zero;
    - `l1`: the mean over tokens of \\(\sum_i |f_i|\\);
    - `dead_fraction`: the share of features that never fired on the tokens seen. It falls as more tokens are seen, so
      quote it with `tokens`.

    Args:
        num_features (`int`):
            Number of features of the dictionary.
        device (`torch.device`, *optional*):
            Device of the sums.
    """

    def __init__(self, num_features: int, device: torch.device | str | None = None):
        super().__init__({"absolute": (), "fired": (num_features,), "activation": (num_features,)}, device)
        self.num_features = num_features

    @torch.no_grad()
    def update(
        self,
        features: Tensor,
        indices: Tensor | None = None,
        mask: Tensor | None = None,
        offsets: Tensor | None = None,
    ) -> None:
        """Add a batch, dense or sparse.

        Args:
            features (`torch.Tensor` of shape `(..., num_features)`, `(..., k)` with `indices`, `(n,)` with `offsets`):
                Feature activations.
            indices (`torch.LongTensor`, *optional*, of the shape of `features`):
                Number of the feature of each value, at most once per token.
            mask (`torch.BoolTensor` of shape `(...)`, *optional*):
                Tokens to count. All by default.
            offsets (`torch.LongTensor` of shape `(tokens + 1,)`, *optional*):
                Start of the values of each token, if tokens have different numbers of values.
        """
        if offsets is not None:
            tokens = len(offsets) - 1
            if mask is not None:
                mask = mask.reshape(-1)
                tokens = self._sum(mask)
                features = features.where(mask.repeat_interleave(offsets.diff(), output_size=len(features)), 0)
        else:
            expected = self.num_features if indices is None else indices.shape[-1]
            if features.shape[-1] != expected:
                raise TranscoderError(
                    f"Features of shape {tuple(features.shape)} do not fit: the last dimension must be {expected}."
                )
            tokens = features[..., 0].numel()
            if mask is not None:
                tokens = self._sum(mask)
                features = features.where(mask[..., None], 0)
        if indices is None:
            features = features.reshape(-1, self.num_features)
            # Counts in float32 are exact up to 2**24 tokens per batch, and twice as fast as in int64.
            fired = features.bool().sum(0, dtype=torch.float32)
            activation = features.sum(0, dtype=torch.float32)
            absolute = self._sum(torch.linalg.vector_norm(features, ord=1, dim=-1, dtype=torch.float32))
        else:
            values = features.reshape(-1).to(self.sums["tokens"].dtype)
            indices = indices.reshape(-1)
            fired = torch.zeros_like(self.sums["fired"]).scatter_add_(0, indices, values.bool().to(values.dtype))
            activation = torch.zeros_like(self.sums["activation"]).scatter_add_(0, indices, values)
            absolute = values.abs().sum()
        self._add(tokens=tokens, absolute=absolute, fired=fired, activation=activation)

    def density(self) -> Tensor:
        """Share of tokens `(num_features,)` on which each feature is active."""
        sums = self._seen()
        return sums["fired"] / sums["tokens"]

    def mean_activation(self) -> Tensor:
        """Mean activation `(num_features,)` over the tokens on which each feature is active; 0 if there are none."""
        sums = self._seen()
        return sums["activation"] / sums["fired"].clamp(min=1)

    def compute(self) -> dict[str, float]:
        """The metrics of the class."""
        sums = self._seen()
        return _floats(
            {
                "l0": sums["fired"].sum() / sums["tokens"],
                "l1": sums["absolute"] / sums["tokens"],
                "dead_fraction": (sums["fired"] == 0).to(sums["fired"].dtype).mean(),
            }
        )


class LossStatistics(SumStatistics):
    r"""Effect of a change inside a language model on its next-token predictions.

    `compute` gives `ce`, the mean cross-entropy in nats; `kl`, the mean of \\(KL(p_{original} \| p)\\) in nats; and
    `top1_agreement`, the share of tokens whose most likely successor is unchanged.

    Args:
        device (`torch.device`, *optional*):
            Device of the sums.
    """

    def __init__(self, device: torch.device | str | None = None):
        super().__init__({"ce": (), "kl": (), "top1_agreement": ()}, device)

    @torch.no_grad()
    def update(self, ce: Tensor, kl: Tensor, top1_agreement: Tensor) -> None:
        """Add a batch of per-token values of the same shape, as returned by [`NextTokenComparison`]."""
        self._add(tokens=ce.numel(), ce=self._sum(ce), kl=self._sum(kl), top1_agreement=self._sum(top1_agreement))

    def compute(self) -> dict[str, float]:
        """The metrics of the class."""
        sums = self._seen()
        return _floats({name: sums[name] / sums["tokens"] for name in ("ce", "kl", "top1_agreement")})


class NextTokenComparison:
    """Compares next-token predictions of changed models with those of the unchanged one.

    Args:
        original_logits (`torch.Tensor` of shape `(..., vocab_size)`):
            Logits of the unchanged model.
        labels (`torch.LongTensor` of shape `(...)`):
            Tokens that come next in the text.
    """

    # Replaces log 0: multiplied by a probability of 0 it gives 0, where -inf would give nan.
    _LOG_ZERO = -1e30

    @torch.no_grad()
    def __init__(self, original_logits: Tensor, labels: Tensor):
        self.labels = labels
        self.top = original_logits.argmax(-1)
        self.log_probs = original_logits.float().log_softmax(-1)
        self.probs = self.log_probs.exp()
        self.log_probs.clamp_(min=self._LOG_ZERO)

    @torch.no_grad()
    def __call__(self, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        r"""Cross-entropy, KL divergence and top-1 agreement.

        Args:
            logits (`torch.Tensor` of shape `(..., vocab_size)`):
                Logits of the changed model.

        Returns:
            `tuple[torch.Tensor, torch.Tensor, torch.Tensor]`: per token, each of shape `(...)`: the cross-entropy of
            `logits`, \\(KL(p_{original} \| p)\\), both in nats, and whether the two agree on the most likely token.
        """
        agree = logits.argmax(-1) == self.top
        log_probs = logits.float().log_softmax(-1)
        ce = -self._of_labels(log_probs)
        kl = (self.log_probs - log_probs.clamp_(min=self._LOG_ZERO)).mul_(self.probs).sum(-1)
        return ce, kl, agree

    def _of_labels(self, log_probs):
        return log_probs.gather(-1, self.labels[..., None]).squeeze(-1)


def ce_recovered(ce_original: float, ce_spliced: float, ce_ablated: float) -> float:
    r"""Share of the loss increase under ablation that is avoided by splicing in the dictionary.

    \\((CE_{ablated} - CE_{spliced}) / (CE_{ablated} - CE_{original})\\): 1 when splicing the dictionary in costs
    nothing, 0 when it is no better than the ablation, `nan` when the ablation itself costs nothing.

    Args:
        ce_original (`float`):
            Cross-entropy of the unchanged model.
        ce_spliced (`float`):
            Cross-entropy with the output replaced by the reconstruction.
        ce_ablated (`float`):
            Cross-entropy with the output replaced by zero or by its mean.
    """
    damage = ce_ablated - ce_original
    return (ce_ablated - ce_spliced) / damage if damage else float("nan")


#: Edges of the bins of a density histogram in log10: from one token in a million to every token.
DENSITY_EDGES = [edge / 2 for edge in range(-12, 1)]


def density_histogram(density: Tensor) -> dict[str, list[float] | list[int] | int]:
    """Count features by density.

    Args:
        density (`torch.Tensor` of shape `(num_features,)`):
            Share of tokens each feature fired on.

    Returns:
        `dict`: `log10_edges`, the boundaries of the bins; `counts`, the features in each bin (those rarer than the
        first boundary are in the first bin); and `never_fired`, the features in no bin.
    """
    fired = density[density > 0].log10()
    inner = torch.tensor(DENSITY_EDGES[1:-1], dtype=fired.dtype, device=fired.device)
    counts = torch.bincount(torch.bucketize(fired, inner, right=True), minlength=len(DENSITY_EDGES) - 1)
    return {
        "log10_edges": list(DENSITY_EDGES),
        "counts": counts.tolist(),
        "never_fired": int((density == 0).sum()),
    }
