"""Which implementation is taken. Kernels themselves are tested in `tests/ops/triton`."""

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from hf_transcoders.ops import dispatch, pairs, pairs_dense, sparse


N, ROWS = 64, 8


def draw(*shape, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=dtype)


@pytest.fixture
def as_if_on_gpu(monkeypatch):
    """CPU tensors are taken for those of a GPU with Triton."""
    monkeypatch.delenv("HF_TRANSCODERS_KERNELS", raising=False)
    monkeypatch.setattr(dispatch, "_KERNEL_DEVICES", ("cpu",))
    monkeypatch.setattr(dispatch, "_has_triton", lambda: True)


def test_tensors_on_a_cpu_take_the_operations_of_pytorch():
    assert not dispatch.uses_kernels(draw(N, 4))
    assert dispatch.operations(draw(N, 4), N, ROWS, 4) is pairs.PairSums
    assert dispatch.sparse_operations(draw(N, 4)) is pairs.PairSums


def test_kernels_are_taken_only_where_all_of_it_holds(as_if_on_gpu, monkeypatch):
    table = draw(N, 4)
    assert dispatch.uses_kernels(table, table.bfloat16(), table.half())
    assert not dispatch.uses_kernels(table, table.double())
    assert not dispatch.uses_kernels(table, table.to("meta"))
    monkeypatch.setenv("HF_TRANSCODERS_KERNELS", "0")
    assert not dispatch.uses_kernels(table) and dispatch.operations(table, N, ROWS, 4) is pairs.PairSums
    monkeypatch.delenv("HF_TRANSCODERS_KERNELS")
    monkeypatch.setattr(dispatch, "_has_triton", lambda: False)
    assert not dispatch.uses_kernels(table)


def test_old_gpus_take_the_operations_of_pytorch(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert not dispatch._capable.__wrapped__(torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert dispatch._capable.__wrapped__(torch.device("cuda", 0))
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert not dispatch._capable.__wrapped__(torch.device("cuda", 0))


@pytest.mark.parametrize(
    "features, k, dtype, dense",
    [
        (24576, 64, torch.bfloat16, False),
        (24576, 256, torch.bfloat16, True),
        (4608, 64, torch.bfloat16, True),
        (4608, 64, torch.float32, False),
        (512, 64, torch.float32, True),
    ],
)
def test_dense_products_where_many_features_are_active(features, k, dtype, dense):
    assert dispatch.prefers_dense(dtype, features, 4096, 4096 * k) == dense


def test_dense_products_are_only_for_gpus(as_if_on_gpu, monkeypatch):
    table = draw(N, 4)
    assert dispatch.operations(table, N, ROWS, ROWS * 32) is pairs_dense.DensePairSums
    monkeypatch.setattr(dispatch, "_KERNEL_DEVICES", ("cuda",))
    assert dispatch.operations(table, N, ROWS, ROWS * 32) is pairs.PairSums


def test_rows_are_read_in_low_precision_under_autocast_on_a_gpu_alone(as_if_on_gpu, monkeypatch):
    weight = draw(N, 4)
    with torch.autocast("cpu", torch.bfloat16):
        assert dispatch.product_dtype(weight) == dispatch.table_dtype(weight) == torch.bfloat16
        monkeypatch.setattr(dispatch, "_KERNEL_DEVICES", ("cuda",))
        assert dispatch.product_dtype(weight) == torch.bfloat16 and dispatch.table_dtype(weight) == torch.float32
    assert dispatch.product_dtype(weight) == dispatch.table_dtype(weight) == torch.float32


def test_a_product_in_fp32_is_left_to_the_library_unless_it_runs_on_tensor_cores(as_if_on_gpu, monkeypatch):
    weight = draw(N, 4)
    assert not sparse._fuses_selection(draw(ROWS, 4), weight)
    assert sparse._fuses_selection(draw(ROWS, 4), weight.bfloat16())
    monkeypatch.setattr(torch.backends.cuda, "matmul", SimpleNamespace(fp32_precision="tf32"))
    assert sparse._fuses_selection(draw(ROWS, 4), weight)
    # PyTorch before 2.9.
    for allowed in (True, False):
        monkeypatch.setattr(torch.backends.cuda, "matmul", SimpleNamespace(allow_tf32=allowed))
        assert sparse._fuses_selection(draw(ROWS, 4), weight) == allowed


def test_the_error_of_a_decoder_on_a_cpu_is_that_of_its_parts():
    offsets, indices = torch.arange(0, ROWS * 2 + 1, 2), torch.arange(ROWS * 2)
    values, weight, bias, targets = draw(ROWS * 2), draw(N, 5), draw(5), draw(ROWS, 5)
    rows = draw(ROWS, 5)
    total, squared = sparse.sparse_decode_error(offsets, indices, values, weight, [bias, rows], targets)
    expected = sparse.sparse_decode(offsets, indices, values, weight) + bias + rows
    assert torch.equal(total, expected) and torch.equal(squared, (expected - targets).square().sum(1))
    assert sparse.firing_counts(offsets, indices, values, N, pairs.SharedOrder()) is None
    assert sparse.sparse_encode_above(draw(ROWS, 5), weight, bias, bias) is None


@pytest.mark.parametrize("kind", [torch.float64, torch.float32])
def test_dense_sums_equal_those_of_pairs(kind):
    generator = torch.Generator().manual_seed(0)
    counts = [0, 3, 0, 5, 1, 0, 2, 0]
    offsets = torch.tensor([0, *counts]).cumsum(0)
    indices = torch.cat([torch.randperm(N, generator=generator)[:count] for count in counts])
    values, table, rows = draw(len(indices), dtype=kind), draw(N, 5, dtype=kind), draw(ROWS, 5, dtype=kind)
    for name, arguments in {
        "weighted_rows": (values, table),
        "paired_dots": (rows, table),
        "scatter_rows": (values, rows, N, pairs.SharedOrder()),
        "scatter_values": (values, N, pairs.SharedOrder()),
    }.items():
        expected = getattr(pairs.PairSums, name)(offsets, indices, *arguments)
        torch.testing.assert_close(getattr(pairs_dense.DensePairSums, name)(offsets, indices, *arguments), expected)


def test_pairs_are_sorted_once_for_all_gradients(monkeypatch):
    sorts = []
    make = pairs._by_feature
    monkeypatch.setattr(pairs, "_by_feature", lambda *args: sorts.append(1) or make(*args))
    order = pairs.SharedOrder()
    encoder, decoder = draw(N, 4).requires_grad_(), draw(N, 4).requires_grad_()
    chosen = sparse.sparse_encode_topk(draw(ROWS, 4), encoder, draw(N), 3, order)
    sparse.sparse_decode(*chosen, decoder, order).sum().backward()
    assert len(sorts) == 1 and encoder.grad.any() and decoder.grad.any()


@pytest.mark.parametrize(
    "version, accepted", [("3.5.1", False), ("3.6.0", True), ("3.10.0+git1a2b", True), ("4.0", True)]
)
def test_old_versions_of_triton_are_left_alone(version, accepted, monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", SimpleNamespace(__version__=version))
    assert dispatch._has_triton.__wrapped__() == accepted
    monkeypatch.setitem(sys.modules, "triton", None)
    assert not dispatch._has_triton.__wrapped__()


def test_without_triton_nothing_imports_it():
    script = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch, hf_transcoders.ops as ops\n"
        "print(ops.sparse_encode_topk(torch.ones(2, 3), torch.ones(8, 3), torch.ones(8), 2)[2].tolist())"
    )
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert found.stdout.split("\n")[0] == "[4.0, 4.0, 4.0, 4.0]", found.stderr
