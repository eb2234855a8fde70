"""The differentiable operations with kernels inside: values and gradients against dense float64, and finite differences."""

import pytest
import torch

from hf_transcoders.ops import SharedOrder, dispatch, sparse, sparse_decode, sparse_decode_error, sparse_encode_topk
from hf_transcoders.ops.sparse import firing_counts

from .kernel_cases import DEVICE, dense_of, draw, draw_pairs


pytest.importorskip("triton", reason="Triton is not installed: pip install 'hf_transcoders[kernels]'")

ROWS, D, N, K = 11, 19, 24, 3


def leaves(*tensors):
    return [tensor.detach().clone().requires_grad_() for tensor in tensors]


@pytest.fixture(params=["gathered", "dense"])
def products(request, kernels, monkeypatch):
    """Both ways that the dispatcher computes sums over pairs on a GPU."""
    if request.param == "dense":
        monkeypatch.setattr(dispatch, "_DENSE_BELOW", 10**9)
        monkeypatch.setattr(dispatch, "_DENSE_BELOW_FP32", 10**9)
    return request.param


@pytest.mark.parametrize("kind", ["ragged", "shared", "empty"])
def test_decode_and_its_gradients(kind, products):
    offsets, indices = draw_pairs(kind, ROWS, N)
    values, weight = leaves(draw(len(indices)), draw(N, D, seed=1))
    upstream = draw(ROWS, D, seed=2)
    out = sparse_decode(offsets, indices, values, weight)
    ours = torch.autograd.grad(out, (values, weight), upstream)
    exact = leaves(values.double(), weight.double())
    expected = dense(offsets, indices, exact[0]) @ exact[1]
    theirs = torch.autograd.grad(expected, exact, upstream.double())
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
    for our, their in zip(ours, theirs, strict=True):
        assert our.dtype == torch.float32
        torch.testing.assert_close(our.double(), their, rtol=1e-5, atol=1e-5)


def dense(offsets, indices, values):
    """The pairs as a matrix, differentiable."""
    rows = torch.repeat_interleave(torch.arange(len(offsets) - 1, device=values.device), offsets.diff())
    return values.new_zeros(len(offsets) - 1, N).index_put((rows, indices), values)


@pytest.mark.parametrize(
    "uses, terms",
    [("both", "none"), ("both", "bias"), ("both", "bias and rows"), ("error", "bias"), ("reconstruction", "bias")],
)
def test_decode_with_error_and_its_gradients(uses, terms, products):
    offsets, indices = draw_pairs("ragged", ROWS, N)
    count = {"none": 0, "bias": 1, "bias and rows": 2}[terms]
    added = [draw(D, seed=3), draw(ROWS, D, seed=4)][:count]
    inputs = leaves(draw(len(indices)), draw(N, D, seed=1), draw(ROWS, D, seed=5), *added)
    upstream = draw(ROWS, D, seed=2), draw(ROWS, seed=6)

    def loss(total, squared, upstream):
        parts = {"reconstruction": (total * upstream[0]).sum(), "error": (squared * upstream[1]).sum()}
        return sum(parts.values()) if uses == "both" else parts[uses]

    values, weight, targets, *added = inputs
    total, squared = sparse_decode_error(offsets, indices, values, weight, added, targets)
    exact = leaves(*(tensor.double() for tensor in inputs))
    values, weight, targets, *added = exact
    expected = dense(offsets, indices, values) @ weight + sum(added)
    expected_squared = (expected - targets).square().sum(1)
    torch.testing.assert_close(total.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(squared.double(), expected_squared, rtol=1e-5, atol=1e-5)
    ours = torch.autograd.grad(loss(total, squared, upstream), inputs, allow_unused=True)
    doubles = [each.double() for each in upstream]
    theirs = torch.autograd.grad(loss(expected, expected_squared, doubles), exact, allow_unused=True)
    for our, their in zip(ours, theirs, strict=True):
        assert (our is None or not our.any()) if their is None else True
        if their is not None:
            torch.testing.assert_close(our.double(), their, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("inputs_need_gradient", [False, True])
def test_encode_and_its_gradients(inputs_need_gradient, products):
    tensors = draw(ROWS, D), draw(N, D, seed=1), draw(N, seed=2) - 8
    inputs, weight, bias = leaves(*tensors)
    inputs.requires_grad_(inputs_need_gradient)
    offsets, indices, values = sparse_encode_topk(inputs, weight, bias, K)
    exact = leaves(*(tensor.double() for tensor in tensors))
    scores = exact[0] @ exact[1].T + exact[2]
    chosen = scores.topk(K, dim=-1)
    # Some of the chosen features are off, and learn nothing.
    assert 0 < (values == 0).sum() < len(values)
    assert torch.equal(indices.view(ROWS, K), chosen.indices)
    assert offsets.tolist() == list(range(0, ROWS * K + 1, K))
    expected = chosen.values.relu().reshape(-1)
    torch.testing.assert_close(values.double(), expected, rtol=1e-5, atol=1e-5)
    upstream = draw(len(values), seed=3)
    wanted = ([inputs] if inputs_need_gradient else []) + [weight, bias]
    ours = torch.autograd.grad(values, wanted, upstream)
    theirs = torch.autograd.grad(expected, exact[3 - len(wanted) :], upstream.double())
    for our, their in zip(ours, theirs, strict=True):
        torch.testing.assert_close(our.double(), their, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:Input .* is not a double precision")
def test_finite_differences(kernels):
    """All functions are linear or quadratic in each argument, so that large steps in fp32 give exact derivatives."""
    options = {"eps": 0.5, "atol": 1e-3, "rtol": 1e-3, "fast_mode": True, "nondet_tol": 0.0}
    rows, width, features = 4, 6, 16
    offsets, indices = draw_pairs("ragged", rows, features)
    values, weight, bias = leaves(draw(len(indices)), draw(features, width, seed=1), draw(width, seed=2))
    targets = draw(rows, width, seed=3)
    assert torch.autograd.gradcheck(lambda v, w: sparse_decode(offsets, indices, v, w), (values, weight), **options)
    assert torch.autograd.gradcheck(
        lambda v, w, b: sparse_decode_error(offsets, indices, v, w, [b], targets), (values, weight, bias), **options
    )
    # Far apart, so that a step changes neither the selection nor what is off.
    bias = torch.where(torch.arange(features) % 6 == 0, 200.0, -900.0) + 10 * torch.arange(features)
    inputs, weight, bias = leaves(draw(rows, width), draw(features, width, seed=1), bias.to(DEVICE))
    values = sparse_encode_topk(inputs, weight, bias, 4)[2]
    assert (values == 0).sum() == rows and torch.autograd.gradcheck(
        lambda x, w, b: sparse_encode_topk(x, w, b, 4)[2], (inputs, weight, bias), **{**options, "atol": 1e-2}
    )


def test_autocast_ranks_and_gathers_in_low_precision_and_sums_in_full(kernels):
    tensors = draw(ROWS, D), draw(N, D, seed=1), draw(N, seed=2), draw(N, D, seed=3)
    inputs, encoder, bias, decoder = leaves(*tensors)
    targets, order = draw(ROWS, D, seed=4), SharedOrder()
    with torch.autocast(DEVICE, torch.bfloat16):
        offsets, indices, values = sparse_encode_topk(inputs, encoder, bias, K, order)
        total, squared = sparse_decode_error(offsets, indices, values, decoder, [], targets, order)
    assert values.dtype == total.dtype == squared.dtype == torch.float32
    low = [tensor.bfloat16().double() for tensor in tensors]
    assert torch.equal(
        indices.view(ROWS, K).sort().values, (low[0] @ low[1].T + tensors[2].double()).topk(K).indices.sort().values
    )
    # The values are exact, whatever the features were ranked in.
    rows = torch.arange(ROWS, device=DEVICE).repeat_interleave(K)
    exact = ((tensors[0].double()[rows] * tensors[1].double()[indices]).sum(1) + tensors[2].double()[indices]).relu()
    torch.testing.assert_close(values.double(), exact, rtol=1e-5, atol=1e-5)
    expected = dense_of(offsets, indices, values.detach(), N) @ low[3]
    torch.testing.assert_close(total.double(), expected, rtol=1e-5, atol=1e-5)
    squared.sum().backward()
    residual = 2 * (expected - targets.double())
    # The residual and its gradient were rounded to bf16.
    wanted = dense_of(offsets, indices, values.detach(), N).T @ residual
    assert (decoder.grad - wanted).norm() < 2**-7 * wanted.norm()
    assert encoder.grad.dtype == inputs.grad.dtype == torch.float32 and encoder.grad.any()


def test_one_sort_a_step(kernels, monkeypatch):
    from hf_transcoders.ops.triton import pairs_triton

    sorts = []
    make = pairs_triton.by_feature
    monkeypatch.setattr(pairs_triton, "by_feature", lambda *args: sorts.append(1) or make(*args))
    inputs, encoder, bias, decoder = leaves(draw(ROWS, D), draw(N, D, seed=1), draw(N, seed=2) - 8, draw(N, D, seed=3))
    order = SharedOrder()
    pairs = sparse_encode_topk(inputs, encoder, bias, K, order)
    counts = firing_counts(*pairs, N, order)
    sparse_decode(*pairs, decoder, order).square().sum().backward()
    assert len(sorts) == 1
    active = (dense_of(*(each.detach() for each in pairs), N) > 0).sum(0)
    assert torch.equal(counts.long(), active) and active.sum() < len(pairs[1])


def test_the_same_bits_every_time(kernels):
    tensors = draw(ROWS, D), draw(N, D, seed=1), draw(N, seed=2), draw(N, D, seed=3)
    targets = draw(ROWS, D, seed=4)

    def run():
        inputs, encoder, bias, decoder = leaves(*tensors)
        order = SharedOrder()
        pairs = sparse_encode_topk(inputs, encoder, bias, K, order)
        total, squared = sparse_decode_error(*pairs, decoder, [], targets, order)
        squared.sum().backward()
        return [total, squared, *(leaf.grad for leaf in (inputs, encoder, bias, decoder))]

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


def test_double_backward_is_refused(kernels):
    offsets, indices = draw_pairs("equal", ROWS, N)
    values, weight = leaves(draw(len(indices)), draw(N, D, seed=1))
    (grad,) = torch.autograd.grad(
        sparse_decode(offsets, indices, values, weight).square().sum(), weight, create_graph=True
    )
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_more_active_features_than_tiles_can_keep(kernels):
    inputs, weight, bias = draw(ROWS, D), draw(N, D, seed=1), draw(N, seed=2)
    assert sparse._choose_topk(inputs, weight, bias, 20) is None
    indices = sparse_encode_topk(inputs, weight, bias, 20)[1].view(ROWS, 20)
    expected = (inputs @ weight.T + bias).topk(20).indices
    assert torch.equal(indices.sort().values, expected.sort().values)


def test_without_rows(kernels):
    weight, bias = draw(N, D, seed=1), draw(N, seed=2)
    offsets, indices, values = sparse_encode_topk(weight[:0], weight, bias, K)
    assert offsets.tolist() == [0] and not len(indices) and not len(values)
    assert sparse_decode(offsets, indices, values, weight).shape == (0, D)
    assert sparse.sparse_encode_above(weight[:0], weight, bias, bias) is None
