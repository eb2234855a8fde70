"""Features above a threshold by the fused kernel, against float64."""

import pytest
import torch

from .kernel_cases import DTYPES, draw


above = pytest.importorskip("hf_transcoders.ops.triton.above_threshold")

COLUMNS = 32


def find(inputs, weight, bias, threshold, capacity=8):
    offsets, indices = above.above_threshold(inputs, weight, bias, threshold, "ieee", COLUMNS, capacity)
    rows = torch.repeat_interleave(torch.arange(len(inputs), device=inputs.device), offsets.diff())
    return rows, indices


def expected_of(inputs, weight, bias, threshold):
    scores = inputs.double() @ weight.double().T + bias.double()
    rows, columns = (~(scores <= threshold)).nonzero(as_tuple=True)
    return rows, columns


def compare(found, expected):
    # Row by row and in ascending order of features.
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows, width, features", [(16, 64, 128), (21, 37, 124), (1, 16, 96)])
def test_finds_what_is_above(rows, width, features, dtype):
    inputs, weight, bias = draw(rows, width, dtype=dtype), draw(features, width, seed=1, dtype=dtype), draw(features)
    threshold = draw(features, seed=3).abs() + 1.2 * width**0.5
    # The last feature is on in every row. It must not be found again in the columns past the end of its tile, which are few
    # enough in the second shape to fit into the row's part of it.
    threshold[-1] = -1e3
    expected = expected_of(inputs, weight, bias, threshold)
    assert 0 < len(expected[0]) < rows * features / 4
    compare(find(inputs, weight, bias, threshold), expected)


@pytest.mark.parametrize("capacity", [1, 2, 8])
def test_rows_with_more_than_fit_are_computed_again(capacity):
    inputs, weight, bias = draw(8, 16), draw(64, 16, seed=1), draw(64, seed=2)
    threshold = torch.full((64,), 4.0, device=inputs.device)
    bias[:32] += 6.0
    inputs[3] = inputs[6] = 0.0
    expected = expected_of(inputs, weight, bias, threshold)
    assert expected[0].bincount(minlength=8).max() > 20
    compare(find(inputs, weight, bias, threshold, capacity), expected)


def test_nothing_is_above():
    inputs, weight, bias = draw(5, 16), draw(64, 16, seed=1), torch.full((64,), -100.0)
    rows, indices = find(inputs, weight, bias.to(inputs.device), torch.zeros(64, device=inputs.device))
    assert not len(rows) and not len(indices)


def test_equal_is_not_above_and_nan_is():
    inputs, weight = draw(4, 16), torch.zeros(64, 16)
    bias, threshold = torch.ones(64), torch.ones(64)
    bias[9], threshold[40], bias[63] = float("nan"), 0.5, -1.0
    rows, indices = find(inputs, *(t.to(inputs.device) for t in (weight, bias, threshold)))
    assert rows.tolist() == [0, 0, 1, 1, 2, 2, 3, 3] and indices.tolist() == [9, 40] * 4


def test_the_same_bits_every_time():
    inputs, weight, bias = draw(16, 32), draw(64, 32, seed=1), draw(64, seed=2)
    threshold = torch.full((64,), 5.0, device=inputs.device)
    first, second = (find(inputs, weight, bias, threshold, 1) for _ in range(2))
    assert len(first[0]) and all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
