import pytest
import torch

from hf_transcoders.errors import TranscoderError
from hf_transcoders.evaluation.statistics import (
    FeatureStatistics,
    LossStatistics,
    NextTokenComparison,
    ReconstructionStatistics,
    ce_recovered,
    density_histogram,
)


TOKENS, WIDTH, FEATURES = 203, 24, 40


def reconstruction_reference(y, r):
    """The definitions, term by term, in float64."""
    y, r = y.double(), r.double()
    error = (y - r).square().sum()
    fvu = error / (y - y.mean(0)).square().sum()
    return {
        "mse": (y - r).square().mean().item(),
        "normalized_mse": (error / y.square().sum()).item(),
        "fvu": fvu.item(),
        "explained_variance": 1 - fvu.item(),
        "cosine": torch.cosine_similarity(y, r, dim=-1).mean().item(),
        "l2_ratio": (r.norm(dim=-1) / y.norm(dim=-1)).mean().item(),
        "relative_reconstruction_bias": (r.square().sum() / (y * r).sum()).item(),
    }


def pair(offset=0.0, noise=0.3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    target = torch.randn(TOKENS, WIDTH, generator=generator) + offset
    return target, 0.9 * target + noise * torch.randn(TOKENS, WIDTH, generator=generator)


def sparse_features(seed=0, k=5):
    generator = torch.Generator().manual_seed(seed)
    # Features 30 and up never fire.
    values, indices = torch.rand(TOKENS, 30, generator=generator).topk(k)
    values = (values - 0.9).relu()
    dense = torch.zeros(TOKENS, FEATURES).scatter(-1, indices, values)
    return dense, values, indices


@pytest.mark.parametrize("offset", [0.0, 1e2, 1e4])
def test_reconstruction_metrics_match_float64(offset):
    target, reconstruction = pair(offset)
    reconstruction = target + 0.01 * (reconstruction - target) if offset else reconstruction
    statistics = ReconstructionStatistics(WIDTH)
    for y, r in zip(target.split(50), reconstruction.split(50), strict=True):
        statistics.update(y, r)
    assert statistics.tokens == TOKENS
    assert statistics.compute() == pytest.approx(reconstruction_reference(target, reconstruction), rel=2e-6)
    torch.testing.assert_close(statistics.mean_target(), target.double().mean(0), rtol=0, atol=1e-6)


def test_float32_sums_would_fail_the_offset_test():
    # Guards the test above: with plain float32 sums of squares this mean drowns the variance.
    target, reconstruction = pair(1e4)
    naive = target.square().sum() - TOKENS * target.mean(0).square().sum()
    exact = (target.double() - target.double().mean(0)).square().sum()
    assert abs(naive / exact - 1) > 0.1


def test_batches_with_different_means_keep_the_variance_between_them():
    target = torch.cat([torch.randn(64, WIDTH), torch.randn(64, WIDTH) + 1e4])
    statistics = ReconstructionStatistics(WIDTH)
    for y in target.split(64):
        statistics.update(y, y + 1)
    assert statistics.compute()["fvu"] == pytest.approx(reconstruction_reference(target, target + 1)["fvu"], rel=1e-6)


def test_perfect_and_zero_reconstruction():
    target, _ = pair(offset=3.0)
    perfect, zero, mean = (ReconstructionStatistics(WIDTH) for _ in range(3))
    perfect.update(target, target)
    zero.update(target, torch.zeros_like(target))
    mean.update(target, target.mean(0).expand_as(target))
    assert perfect.compute()["fvu"] == 0
    assert perfect.compute()["cosine"] == pytest.approx(1, abs=1e-6)
    assert zero.compute()["normalized_mse"] == pytest.approx(1, abs=1e-6)
    assert zero.compute()["cosine"] == 0
    assert mean.compute()["explained_variance"] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs_are_measured_in_float32(dtype):
    target, reconstruction = (tensor.to(dtype) for tensor in pair())
    statistics = ReconstructionStatistics(WIDTH)
    statistics.update(target, reconstruction)
    assert statistics.compute() == pytest.approx(reconstruction_reference(target, reconstruction), rel=2e-6)


def test_masked_tokens_do_not_count_even_when_nan():
    target, reconstruction = pair(offset=50.0)
    dense, values, indices = sparse_features()
    mask = torch.rand(TOKENS) > 0.4
    mask[::16] = False  # the rows the centring vector is taken from
    plain, masked = ReconstructionStatistics(WIDTH), ReconstructionStatistics(WIDTH)
    plain.update(target[mask], reconstruction[mask])
    target[~mask] = float("nan")
    masked.update(target, reconstruction, mask)
    assert masked.tokens == plain.tokens == mask.sum()
    assert masked.compute() == pytest.approx(plain.compute(), rel=2e-6)

    expected = FeatureStatistics(FEATURES)
    expected.update(dense[mask])
    dense[~mask] = float("nan")
    for arguments in ((dense,), (values, indices)):
        statistics = FeatureStatistics(FEATURES)
        statistics.update(*arguments, mask=mask)
        assert statistics.compute() == pytest.approx(expected.compute(), rel=1e-6)


@pytest.mark.parametrize("form", ["dense", "sparse"])
def test_feature_metrics_match_definitions(form):
    dense, values, indices = sparse_features()
    statistics = FeatureStatistics(FEATURES)
    for rows in torch.arange(TOKENS).split(64):
        statistics.update(*((dense[rows],) if form == "dense" else (values[rows], indices[rows])))
    fired = dense.double() != 0
    assert 0 < fired.sum() < values.numel()  # some of the k values are zero and must not count
    assert statistics.compute() == pytest.approx(
        {
            "l0": fired.sum(-1).double().mean().item(),
            "l1": dense.double().abs().sum(-1).mean().item(),
            "dead_fraction": (~fired.any(0)).double().mean().item(),
        },
        rel=1e-6,
    )
    assert statistics.tokens == TOKENS
    torch.testing.assert_close(statistics.density(), fired.double().mean(0), rtol=1e-12, atol=0)
    expected = dense.double().sum(0) / fired.sum(0).clamp(min=1)
    torch.testing.assert_close(statistics.mean_activation(), expected, rtol=1e-6, atol=0)


def test_features_in_offset_form():
    dense, _, _ = sparse_features()
    rows, indices = dense.nonzero(as_tuple=True)
    offsets = torch.cat([torch.zeros(1, dtype=torch.long), (dense != 0).sum(-1).cumsum(0)])
    mask = torch.rand(TOKENS) > 0.4
    for keep in (None, mask):
        expected, statistics = FeatureStatistics(FEATURES), FeatureStatistics(FEATURES)
        expected.update(dense, mask=keep)
        statistics.update(dense[rows, indices], indices, mask=keep, offsets=offsets)
        assert statistics.tokens == expected.tokens
        assert statistics.compute() == pytest.approx(expected.compute(), rel=1e-6)


def test_density_histogram_counts_each_feature_once():
    density = torch.tensor([0.0, 1e-8, 2e-6, 0.05, 0.099, 0.1, 0.5, 1.0], dtype=torch.float64)
    histogram = density_histogram(density)
    assert histogram["log10_edges"][0] == -6 and histogram["log10_edges"][-1] == 0
    assert histogram["never_fired"] == 1
    #                              -6 .. -5.5          ...          -1.5 .. -1 .. -0.5 .. 0
    assert histogram["counts"] == [2, 0, 0, 0, 0, 0, 0, 0, 0, 2, 1, 2]


def test_loss_metrics_match_definitions():
    logits, original = torch.randn(2, 7, 11, 50).mul(3).unbind()
    labels = torch.randint(50, (7, 11))
    statistics = LossStatistics()
    for rows in ([0, 1, 2], [3, 4, 5, 6]):
        statistics.update(*NextTokenComparison(original[rows], labels[rows])(logits[rows]))
    p, q = original.double().softmax(-1), logits.double().softmax(-1)
    assert statistics.compute() == pytest.approx(
        {
            "ce": -q.gather(-1, labels[..., None]).log().mean().item(),
            "kl": (p * (p / q).log()).sum(-1).mean().item(),
            "top1_agreement": (p.argmax(-1) == q.argmax(-1)).double().mean().item(),
        },
        rel=1e-5,
    )


def test_kl_survives_tokens_that_are_ruled_out():
    ruled_out = float("-inf")
    original = torch.tensor([[0.0, ruled_out, 1.0, ruled_out]])
    logits = torch.tensor([[0.0, 0.0, 1.0, ruled_out]])
    _, kl, _ = NextTokenComparison(original, torch.tensor([0]))(logits)
    p, q = original.softmax(-1)[0], logits.softmax(-1)[0]
    assert kl.item() == pytest.approx(sum(p[i] * (p[i] / q[i]).log() for i in (0, 2)).item(), rel=1e-5)


def test_ce_recovered():
    assert ce_recovered(2.0, 2.0, 5.0) == 1
    assert ce_recovered(2.0, 5.0, 5.0) == 0
    assert ce_recovered(2.0, 3.0, 6.0) == 0.75
    assert ce_recovered(2.0, 3.0, 2.0) != ce_recovered(2.0, 3.0, 2.0)  # nan: the ablation cost nothing


def filled(kind, parts):
    dense, values, indices = sparse_features()
    target, reconstruction = pair(offset=1e3)
    losses = torch.rand(3, TOKENS, generator=torch.Generator().manual_seed(1))
    statistics = {
        "reconstruction": lambda: ReconstructionStatistics(WIDTH),
        "features": lambda: FeatureStatistics(FEATURES),
        "loss": LossStatistics,
    }[kind]()
    for rows in parts:
        statistics.update(
            *{
                "reconstruction": (target[rows], reconstruction[rows]),
                "features": (values[rows], indices[rows]),
                "loss": losses[:, rows].unbind(),
            }[kind]
        )
    return statistics


@pytest.mark.parametrize("kind", ["reconstruction", "features", "loss"])
@pytest.mark.parametrize("cut", [1, 64, 130])
def test_merging_equals_seeing_everything(kind, cut):
    rows = torch.arange(TOKENS)
    whole = filled(kind, [rows])
    merged = filled(kind, [rows[:cut]]).merge(filled(kind, rows[cut:].split(50)))
    assert merged.tokens == TOKENS
    assert merged.compute() == pytest.approx(whole.compute(), rel=1e-6)
    merged.reset()
    assert merged.tokens == 0


def test_refusals():
    with pytest.raises(TranscoderError, match="d_out = 24"):
        ReconstructionStatistics(WIDTH).update(torch.zeros(3, 5), torch.zeros(3, 5))
    with pytest.raises(TranscoderError, match="last dimension must be 40"):
        FeatureStatistics(FEATURES).update(torch.zeros(3, 5))
    with pytest.raises(TranscoderError, match="no tokens"):
        LossStatistics().compute()
    with pytest.raises(TranscoderError, match="one class"):
        LossStatistics().merge(FeatureStatistics(3))
    with pytest.raises(TranscoderError, match="same size"):
        FeatureStatistics(4).merge(FeatureStatistics(3))
