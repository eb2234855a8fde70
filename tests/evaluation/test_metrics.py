import subprocess
import sys

import evaluate
import pytest
import torch

from hf_transcoders.evaluation import (
    FVU,
    KL,
    L0,
    DeadFeatures,
    ExplainedVariance,
    FeatureDensity,
    FeatureStatistics,
    LossRecovered,
    LossStatistics,
    ReconstructionStatistics,
    as_batch,
    ce_recovered,
    density_histogram,
)


WIDTH, FEATURES = 6, 20


@pytest.fixture
def options(tmp_path):
    return {"cache_dir": str(tmp_path)}


def batches(count=3):
    for seed in range(count):
        generator = torch.Generator().manual_seed(seed)
        target = torch.randn(10 + seed, WIDTH, generator=generator) + 5
        noise = torch.randn(target.shape, generator=generator)
        features = (torch.rand(len(target), FEATURES, generator=generator) - 0.8).relu()
        features[:, -3:] = 0
        yield target, target + 0.2 * noise, features


def test_combined_metrics_equal_the_plain_functions(options):
    kinds = [L0, FVU, ExplainedVariance, DeadFeatures, FeatureDensity]
    metrics = evaluate.combine([kind(**options) for kind in kinds])
    all_reconstruction, all_features = ReconstructionStatistics(WIDTH), FeatureStatistics(FEATURES)
    for target, output, dense in batches():
        reconstruction, features = ReconstructionStatistics(WIDTH), FeatureStatistics(FEATURES)
        reconstruction.update(target, output)
        features.update(dense)
        all_reconstruction.merge(reconstruction)
        all_features.merge(features)
        metrics.add_batch(**as_batch(reconstruction, features))
    results = metrics.compute()

    fidelity, sparsity = all_reconstruction.compute(), all_features.compute()
    assert results["fvu"] == pytest.approx(fidelity["fvu"], rel=1e-12)
    assert results["explained_variance"] == pytest.approx(fidelity["explained_variance"], rel=1e-12)
    assert results["l0"] == pytest.approx(sparsity["l0"], rel=1e-12)
    assert results["dead_fraction"] == sparsity["dead_fraction"] == 3 / FEATURES
    assert results["dead_fraction_tokens"] == all_features.tokens == 33
    assert results["density"] == pytest.approx(all_features.density().tolist(), rel=1e-12)
    assert results["density_histogram"] == density_histogram(all_features.density())


def test_kl_and_loss_recovered(options):
    kl, recovered = KL(**options), LossRecovered(**options)
    sums = torch.zeros(3, dtype=torch.float64)
    total = LossStatistics()
    for seed in range(2):
        values = torch.rand(3, 7, generator=torch.Generator().manual_seed(seed)) + torch.tensor([[1], [2], [5]])
        statistics = LossStatistics()
        statistics.update(*values)
        total.merge(statistics)
        kl.add_batch(**{name: column for name, column in as_batch(statistics).items() if name in ("tokens", "kl")})
        sums += values.double().sum(-1)
        recovered.add_batch(
            **dict(zip(LossRecovered.columns, values.double().sum(-1, keepdim=True).tolist(), strict=True))
        )
    assert kl.compute()["kl"] == pytest.approx(total.compute()["kl"], rel=1e-12)
    assert recovered.compute()["ce_recovered"] == pytest.approx(ce_recovered(*sums.tolist()), rel=1e-12)


def test_the_package_imports_without_evaluate_and_datasets():
    code = (
        "import sys; sys.modules['evaluate'] = sys.modules['datasets'] = None\n"
        "import hf_transcoders.evaluation as evaluation\n"
        "evaluation.ReconstructionStatistics(3)\n"
        "evaluation.TranscoderEvaluator, evaluation.DriftProbe"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
