import pytest
import torch
import torch.nn.functional as F

from hf_transcoders.ops import batch_topk, pairs, sparse_decode, sparse_encode, sparse_to_dense, topk


ROWS, D, N, K = 7, 5, 24, 3


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def topk_select(scores):
    return torch.arange(0, scores.shape[0] * K + 1, K), topk(scores, K).reshape(-1)


def batch_select(scores):
    return batch_topk(scores, K * scores.shape[0])


def nothing(scores):
    return torch.zeros(scores.shape[0] + 1, dtype=torch.long), torch.zeros(0, dtype=torch.long)


def pattern(kind, seed=0):
    """Offsets and indices: rows of equal length, rows with none at the start, middle and end, one feature everywhere."""
    generator = torch.Generator().manual_seed(seed)
    counts = {"equal": [K] * ROWS, "ragged": [0, 2, 0, 5, 1, 24, 0], "shared": [1] * ROWS, "empty": [0] * ROWS}[kind]
    rows = [torch.randperm(N, generator=generator)[:count] for count in counts]
    if kind == "shared":
        rows = [torch.tensor([11])] * ROWS
    offsets = torch.tensor([0, *counts]).cumsum(0)
    return offsets, torch.cat(rows)


def dense_of(offsets, indices, values, n=N):
    dense = torch.zeros(offsets.numel() - 1, n, dtype=values.dtype)
    rows = []
    for row in range(offsets.numel() - 1):
        cells = torch.zeros(n, dtype=values.dtype)
        for pair in range(int(offsets[row]), int(offsets[row + 1])):
            cells = cells + values[pair] * F.one_hot(indices[pair], n)
        rows.append(cells)
    return torch.stack(rows) if rows else dense


PATTERNS = ["equal", "ragged", "shared", "empty"]


@pytest.fixture(params=["mkl", "no_mkl"])
def product(request, monkeypatch):
    """Both ways of computing the products of chosen pairs, the second in several pieces."""
    if request.param == "no_mkl":
        monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: False)
        monkeypatch.setattr(pairs, "_GATHER_CHUNK", 4 * D)
    elif not torch.backends.mkl.is_available():
        pytest.skip("PyTorch without MKL")


@pytest.mark.parametrize("kind", PATTERNS)
def test_sparse_to_dense_and_its_gradient(kind):
    offsets, indices = pattern(kind)
    values = draw(indices.numel()).requires_grad_()
    dense = sparse_to_dense(offsets, indices, values, N)
    assert torch.equal(dense, dense_of(offsets, indices, values))
    upstream = draw(ROWS, N, seed=1)
    dense.backward(upstream)
    row_numbers = torch.repeat_interleave(torch.arange(ROWS), offsets.diff())
    assert torch.equal(values.grad, upstream[row_numbers, indices])


@pytest.mark.parametrize("kind", PATTERNS)
def test_decode_equals_the_dense_product(kind, product):
    offsets, indices = pattern(kind)
    values, weight = draw(indices.numel()).requires_grad_(), draw(N, D, seed=1).requires_grad_()
    upstream = draw(ROWS, D, seed=2)
    out = sparse_decode(offsets, indices, values, weight)
    gradients = torch.autograd.grad(out, (values, weight), upstream)
    expected = dense_of(offsets, indices, values) @ weight
    torch.testing.assert_close(out, expected)
    if kind == "empty":
        assert gradients[0].numel() == 0 and not gradients[1].any()
    else:
        for ours, theirs in zip(gradients, torch.autograd.grad(expected, (values, weight), upstream), strict=True):
            torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("kind", PATTERNS)
def test_decode_gradcheck(kind, product):
    offsets, indices = pattern(kind)
    values, weight = draw(indices.numel()).requires_grad_(), draw(N, D, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda v, w: sparse_decode(offsets, indices, v, w), (values, weight))


@pytest.mark.parametrize("select", [topk_select, batch_select, nothing])
@pytest.mark.parametrize("inputs_need_gradient", [False, True])
def test_encode_equals_the_dense_product(select, inputs_need_gradient, product):
    inputs = draw(ROWS, D).requires_grad_(inputs_need_gradient)
    weight, bias = draw(N, D, seed=1).requires_grad_(), draw(N, seed=2).requires_grad_()
    leaves = [weight, bias] + [inputs] * inputs_need_gradient
    offsets, indices, values = sparse_encode(inputs, weight, bias, select)

    scores = F.linear(inputs, weight, bias)
    expected_offsets, expected_indices = select(scores.detach())
    assert torch.equal(offsets, expected_offsets) and torch.equal(indices, expected_indices)
    row_numbers = torch.repeat_interleave(torch.arange(ROWS), offsets.diff())
    expected = scores[row_numbers, indices].relu()
    torch.testing.assert_close(values, expected)

    upstream = draw(values.numel(), seed=3)
    ours = torch.autograd.grad(values, leaves, upstream)
    for our, their in zip(ours, torch.autograd.grad(expected, leaves, upstream), strict=True):
        torch.testing.assert_close(our, their)


@pytest.mark.parametrize("select", [topk_select, batch_select])
@pytest.mark.parametrize("inputs_need_gradient", [False, True])
def test_encode_gradcheck(select, inputs_need_gradient, product):
    # Half of the features sit far below zero, so that some are chosen at zero and the selection does not change.
    bias = torch.where(torch.arange(N) % 12 == 0, 2.0, -9.0).double() + draw(N, seed=2) * 0.1
    inputs = draw(ROWS, D).requires_grad_(inputs_need_gradient)
    weight = (draw(N, D, seed=1) * 0.1).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x, w, b: sparse_encode(x, w, b, select)[2], (inputs, weight, bias.requires_grad_())
    )


def test_features_chosen_at_zero_learn_nothing():
    inputs = draw(ROWS, D).requires_grad_()
    weight = (draw(N, D, seed=1) * 0.1).requires_grad_()
    bias = torch.full((N,), -5.0, dtype=torch.float64)
    bias[4] = 5.0
    bias.requires_grad_()
    _, indices, values = sparse_encode(inputs, weight, bias, topk_select)
    assert (values > 0).sum() == ROWS and values.numel() == K * ROWS
    values.sum().backward()
    assert weight.grad[4].any() and bias.grad[4] == ROWS
    others = torch.arange(N) != 4
    assert not weight.grad[others].any() and not bias.grad[others].any()
    torch.testing.assert_close(inputs.grad, weight.detach()[4].expand(ROWS, D))


@pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="PyTorch without MKL")
@pytest.mark.parametrize("kind", PATTERNS)
def test_paired_dots_with_and_without_mkl(kind, monkeypatch):
    offsets, indices = pattern(kind)
    rows, table = draw(ROWS, D), draw(N, D, seed=1)
    with_mkl = pairs.PairSums.paired_dots(offsets, indices, rows, table)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: False)
    for chunk in (1 << 24, 2 * D):
        monkeypatch.setattr(pairs, "_GATHER_CHUNK", chunk)
        torch.testing.assert_close(pairs.PairSums.paired_dots(offsets, indices, rows, table), with_mkl)


def test_autocast_ranks_in_low_precision_and_computes_in_full():
    inputs, weight, bias = (draw(*s, seed=i, dtype=torch.float32) for i, s in enumerate([(ROWS, D), (N, D), (N,)]))
    weight.requires_grad_(), bias.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        offsets, indices, values = sparse_encode(inputs, weight, bias, topk_select)
        ranked = topk_select(F.linear(inputs, weight, bias))[1]
    assert values.dtype == torch.float32
    assert torch.equal(indices, ranked)
    row_numbers = torch.repeat_interleave(torch.arange(ROWS), offsets.diff())
    exact = F.linear(inputs, weight, bias)[row_numbers, indices].relu()
    torch.testing.assert_close(values, exact, rtol=1e-6, atol=1e-6)
    values.sum().backward()
    assert weight.grad.dtype == torch.float32
    expected = torch.autograd.grad(exact.sum(), weight)[0]
    torch.testing.assert_close(weight.grad, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_weights_follow_the_full_ones(dtype):
    offsets, indices = pattern("ragged")
    values, weight = draw(indices.numel()).to(dtype), draw(N, D, seed=1).to(dtype)
    full = values.float().requires_grad_(), weight.float().requires_grad_()
    low = values.requires_grad_(), weight.requires_grad_()
    upstream = draw(ROWS, D, seed=2).to(dtype)
    out, expected = sparse_decode(offsets, indices, *low), sparse_decode(offsets, indices, *full)
    assert out.dtype == dtype
    torch.testing.assert_close(out.float(), expected, rtol=3e-2, atol=3e-2)
    out.backward(upstream), expected.backward(upstream.float())
    for ours, theirs in zip(low, full, strict=True):
        torch.testing.assert_close(ours.grad.float(), theirs.grad, rtol=3e-2, atol=3e-2)


def test_the_same_bits_every_time():
    inputs, weight, bias = (draw(*s, seed=i, dtype=torch.float32) for i, s in enumerate([(64, 32), (256, 32), (256,)]))
    decoder = draw(256, 32, seed=4, dtype=torch.float32)

    def run():
        leaves = [tensor.clone().requires_grad_() for tensor in (inputs, weight, bias, decoder)]
        encoded = sparse_encode(*leaves[:3], batch_select)
        out = sparse_decode(*encoded, leaves[3])
        out.square().sum().backward()
        return [out, encoded[2], *(leaf.grad for leaf in leaves)]

    for first, second in zip(run(), run(), strict=True):
        assert torch.equal(first, second)
