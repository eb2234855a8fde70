"""Dictionaries on kernels against the same dictionaries on PyTorch's operations."""

import copy

import pytest
import torch

from hf_transcoders import TranscoderConfig, TranscoderModel
from hf_transcoders.ops import dispatch, sparse
from hf_transcoders.training.monitor import DictionaryMonitor

from .kernel_cases import DEVICE, draw


pytest.importorskip("triton", reason="Triton is not installed: pip install 'hf_transcoders[kernels]'")

D, N, TOKENS = 20, 40, 9
CONFIGS = {
    "topk": {"activation": "topk", "k": 3},
    "topk_skip_auxk": {
        "activation": "topk", "k": 3, "skip_connection": True, "pre_bias": True, "auxk_coefficient": 0.1, "auxk": 4,
    },
    "topk_nested": {"activation": "topk", "k": 3, "matryoshka_sizes": [16, 40]},
    "topk_tied": {"activation": "topk", "k": 3, "tied": True, "decoder_bias": False},
    "batchtopk": {"activation": "batchtopk", "k": 3},
}  # fmt: skip


def dictionary(**options):
    torch.manual_seed(0)
    model = TranscoderModel(TranscoderConfig(d_in=D, d_out=D, num_features=N, **options))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name != "threshold":
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model.to(DEVICE)


def step(model):
    model = copy.deepcopy(model)
    output = model(draw(TOKENS, D), draw(TOKENS, D, seed=1), dead_features=torch.arange(12, device=DEVICE))
    output.loss.backward()
    return output, {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize(
    "name, reduction", [("topk", "mean"), ("topk", "target_norm"), *((n, "normalized") for n in CONFIGS)]
)
def test_a_training_step(name, reduction, kernels, monkeypatch):
    model = dictionary(loss_reduction=reduction, **CONFIGS[name])
    ours, gradients = step(model)
    monkeypatch.setattr(dispatch, "_KERNEL_DEVICES", ())
    expected, expected_gradients = step(model)
    torch.testing.assert_close(ours.loss, expected.loss)
    torch.testing.assert_close(ours.reconstruction, expected.reconstruction, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours.features, expected.features, rtol=1e-4, atol=1e-5)
    for parameter, gradient in expected_gradients.items():
        torch.testing.assert_close(gradients[parameter], gradient, rtol=1e-4, atol=1e-5 * gradient.abs().max().item())
    counts = (expected.features > 0).sum(0)
    assert torch.equal(ours.feature_counts.long(), counts) and expected.feature_counts is None


def test_a_training_step_with_the_fused_error_calls_the_kernel(kernels, monkeypatch):
    from hf_transcoders.ops.triton import decode_error, exact_topk

    called = []
    for module, name in ((decode_error, "decode_error"), (exact_topk, "topk_scores")):
        function = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *args, f=function, n=name: called.append(n) or f(*args))
    step(dictionary(activation="topk", k=3))
    assert called == ["topk_scores", "decode_error"]


def test_dead_features_are_counted_from_the_sort_of_the_gradients(kernels, monkeypatch):
    model = dictionary(activation="topk", k=3)
    targets = draw(TOKENS, D, seed=1)

    def refreshed():
        monitor = DictionaryMonitor(model, 2 * TOKENS)
        for seed in range(3):
            monitor.update(targets, model(draw(TOKENS, D, seed=seed), targets, output_features=False))
            monitor.refresh()
        return monitor

    ours = refreshed()
    monkeypatch.setattr(dispatch, "_KERNEL_DEVICES", ())
    expected = refreshed()
    assert torch.equal(ours.tokens_since_fired, expected.tokens_since_fired)
    assert torch.equal(ours.dead_features, expected.dead_features) and 0 < len(ours.dead_features) < N


@pytest.mark.parametrize("activation", ["jumprelu", "batchtopk"])
def test_inference_above_a_threshold(activation, kernels, monkeypatch):
    options = {"l0_coefficient": 0.1} if activation == "jumprelu" else {"k": 3}
    model = dictionary(activation=activation, loss_reduction="sum", **options).eval()
    model.threshold.data.fill_(1.9)
    inputs, targets = draw(TOKENS, D), draw(TOKENS, D, seed=1)
    with torch.no_grad():
        ours, few = model(inputs, targets), model(inputs, output_features=False)
        features = model.encode(inputs)
    # Where a gradient may be wanted, all features are computed.
    assert model(inputs).feature_values is None
    monkeypatch.setattr(dispatch, "_KERNEL_DEVICES", ())
    with torch.no_grad():
        expected = model(inputs, targets)
    assert 0 < (expected.features > 0).sum() < TOKENS * N / 4
    for found in (ours.features, features):
        torch.testing.assert_close(found, expected.features, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours.reconstruction, expected.reconstruction, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(few.reconstruction, expected.reconstruction, rtol=1e-4, atol=1e-5)
    assert few.features is None and len(few.feature_values) == (expected.features != 0).sum()
    assert ours.losses.keys() == expected.losses.keys()
    for name, value in expected.losses.items():
        torch.testing.assert_close(ours.losses[name], value)


def test_under_autocast_a_feature_that_is_found_is_above_its_threshold_or_zero(kernels):
    inputs, weight, bias = draw(8, D), draw(N, D, seed=1), torch.zeros(N, device=DEVICE)
    # In bf16, some scores of the first row are found that lie below their threshold.
    threshold = (inputs[0].double() @ weight.double().T + 1e-3).clamp(min=2).float()
    with torch.autocast(DEVICE, torch.bfloat16):
        offsets, indices, values = sparse.sparse_encode_above(inputs, weight, bias, threshold)
    rows = torch.repeat_interleave(torch.arange(8, device=DEVICE), offsets.diff())
    exact = (inputs.double() @ weight.double().T)[rows, indices]
    expected = torch.where(exact > threshold[indices], exact, 0)
    assert values.dtype == torch.float32 and (expected[rows == 0] == 0).any() and (expected > 0).sum() > 8
    torch.testing.assert_close(values.double(), expected, rtol=1e-5, atol=1e-5)
