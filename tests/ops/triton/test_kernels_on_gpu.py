"""What only a GPU shows: large odd shapes, races, memory, and training in bf16 and fp16. Not run without one."""

import pytest
import torch
import torch.nn.functional as F

from hf_transcoders import TranscoderConfig, TranscoderModel
from hf_transcoders.ops import SharedOrder, dispatch, sparse_decode_error, sparse_encode_above, sparse_encode_topk

from .kernel_cases import draw


pytest.importorskip("triton", reason="Triton is not installed: pip install 'hf_transcoders[kernels]'")

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")

# Odd on purpose: no tile of rows, columns or width is full at its end.
ROWS, D, N, K = 3001, 777, 20011, 32


@pytest.fixture(autouse=True)
def a_gpu_with_kernels():
    if not dispatch.uses_kernels(torch.zeros(1, device="cuda")):
        pytest.skip("this GPU or this Triton is too old for the kernels")


def encoder(dtype=torch.float32):
    return draw(ROWS, D, dtype=dtype), draw(N, D, seed=1, dtype=dtype), draw(N, seed=2)


def test_topk_under_autocast_chooses_the_largest_scores_and_never_stores_all():
    inputs, weight, bias = encoder()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
        offsets, indices, values = sparse_encode_topk(inputs, weight, bias, K)
    # Copies of the factors in bf16, and candidates: half a byte for each score.
    copies = 2 * (inputs.numel() + weight.numel())
    assert torch.cuda.max_memory_allocated() - before < copies + 1.5 * ROWS * N + 2**20
    scores = F.linear(inputs.bfloat16().float(), weight.bfloat16().float(), bias)
    best = scores.topk(K, dim=-1)
    ours = scores.gather(1, indices.view(ROWS, K)).sort(descending=True).values
    # Up to scores that agree in their first 17 bits.
    torch.testing.assert_close(ours, best.values, rtol=2**-14, atol=1e-3)
    assert all(len(set(row)) == K for row in indices.view(ROWS, K).tolist())
    exact = (inputs.double()[:, None] * weight.double()[indices.view(ROWS, K)[:, :1]]).sum(-1)[:, 0]
    torch.testing.assert_close(
        values.view(ROWS, K)[:, 0].double(), exact + bias.double()[indices[::K]], rtol=1e-4, atol=1e-3
    )


def test_above_a_threshold_under_autocast():
    inputs, weight, bias = encoder()
    threshold = torch.full((N,), 3 * D**0.5, device="cuda")
    with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
        offsets, indices, values = sparse_encode_above(inputs, weight, bias, threshold)
    scores = F.linear(inputs.double(), weight.double(), bias.double())
    dense = torch.zeros_like(scores)
    dense[torch.arange(ROWS, device="cuda").repeat_interleave(offsets.diff()), indices] = values.double()
    clear = (scores - threshold).abs() > 0.5
    torch.testing.assert_close(dense[clear], (scores * (scores > threshold))[clear], rtol=1e-4, atol=1e-3)


def gradients(dtype, shared=False):
    inputs, weight, bias = (tensor.requires_grad_() for tensor in encoder())
    decoder, targets, order = draw(N, D, seed=3).requires_grad_(), draw(ROWS, D, seed=4), SharedOrder()
    if shared:
        with torch.no_grad():
            bias[17] = 1e4
    with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
        pairs = sparse_encode_topk(inputs, weight, bias, K, order)
        total, squared = sparse_decode_error(*pairs, decoder, [], targets, order)
    squared.mean().backward()
    return [total, squared, *(leaf.grad for leaf in (inputs, weight, bias, decoder))], pairs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shared", [False, True])
def test_the_same_bits_every_time(shared, dtype):
    """Also with one feature that is active on every row, whose sums are split over programs."""
    first, second = gradients(dtype, shared)[0], gradients(dtype, shared)[0]
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_gradients_are_those_of_float64(dtype, bound):
    found, (_, indices, _) = gradients(dtype)
    inputs, weight, bias = (tensor.double().requires_grad_() for tensor in encoder())
    decoder, targets = draw(N, D, seed=3).double().requires_grad_(), draw(ROWS, D, seed=4).double()
    chosen = indices.view(ROWS, K)
    values = F.linear(inputs, weight, bias).gather(1, chosen).relu()
    total = torch.zeros(ROWS, N, dtype=torch.float64, device="cuda").scatter(1, chosen, values) @ decoder
    squared = (total - targets).square().sum(1)
    squared.mean().backward()
    wanted = [total, squared, *(leaf.grad for leaf in (inputs, weight, bias, decoder))]
    for ours, theirs in zip(found, wanted, strict=True):
        assert (ours.double() - theirs).norm() <= bound * theirs.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_training_in_low_precision(dtype):
    torch.manual_seed(0)
    model = TranscoderModel(TranscoderConfig(d_in=96, d_out=96, num_features=4096, k=8)).cuda()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    scaler = torch.amp.GradScaler("cuda", enabled=dtype == torch.float16)
    basis, losses = draw(12, 96), []
    for step in range(60):
        inputs = draw(512, 12, seed=step) @ basis
        with torch.autocast("cuda", dtype):
            loss = model(inputs, inputs, output_features=False).loss
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
    assert sum(losses[-5:]) < 0.3 * sum(losses[:5])
    assert all(parameter.isfinite().all() for parameter in model.parameters())
