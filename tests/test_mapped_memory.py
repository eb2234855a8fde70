"""Pages of mapped files leave memory after a copy, and can be read again."""

import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from hf_transcoders.formats.tensor_files import open_weights
from hf_transcoders.mapped_memory import release_pages


def resident() -> int:
    """Bytes of this process that are mapped from files and in memory."""
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssFile"))


@pytest.fixture
def weights(tmp_path):
    tensors = {"a": torch.randn(3000, 1000), "b": torch.randn(5, 3)}
    save_file(tensors, tmp_path / "weights.safetensors")
    return tmp_path / "weights.safetensors", tensors


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_released_pages_are_read_again(weights):
    path, tensors = weights
    with safe_open(path, framework="pt") as file:
        mapped = file.get_tensor("a")
        assert torch.equal(mapped, tensors["a"])
        before = resident()
        release_pages(mapped)
        assert before - resident() > 0.9 * mapped.nbytes
        assert torch.equal(mapped, tensors["a"])
        release_pages(file.get_tensor("b"))  # Less than a page.


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_changed_tensor_leaves_no_pages_of_its_file(weights):
    path, tensors = weights
    opened = open_weights(path)
    before = resident()
    transposed, halved = opened["a"].T, opened["a"].then(lambda rows: rows / 2)
    assert opened["a"].is_mapped and not transposed.is_mapped and not halved.is_mapped
    assert torch.equal(transposed.read(), tensors["a"].T) and torch.equal(halved.read(), tensors["a"] / 2)
    assert resident() - before < 0.5 * tensors["a"].nbytes
    # What is not copied stays.
    assert torch.equal(opened["a"].then(lambda rows: rows).read(), tensors["a"])
