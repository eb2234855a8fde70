"""The top k of the encoder's product by the fused kernel, against float64 and against `torch.topk`."""

import pytest
import torch

from .kernel_cases import DTYPES, TOLERANCE, draw


exact_topk = pytest.importorskip("hf_transcoders.ops.triton.exact_topk")

COLUMNS = 32
# (rows, width, features): whole blocks; odd sizes, with a tile of one column; a single row.
SHAPES = [(16, 64, 128), (21, 37, 129), (1, 16, 96)]


def scores_of(inputs, weight, bias):
    return inputs.double() @ weight.double().T + bias.double()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows, width, features", SHAPES)
def test_chooses_the_largest_scores(rows, width, features, dtype):
    inputs, weight, bias = draw(rows, width, dtype=dtype), draw(features, width, seed=1, dtype=dtype), draw(features)
    k = 6
    columns, found = exact_topk.topk_scores(inputs, weight, bias, k, 8, "ieee", COLUMNS)
    scores = scores_of(inputs, weight, bias)
    expected = scores.topk(k, dim=-1)
    assert torch.equal(columns, expected.indices)
    # In low precision a score has lost its last 7 bits.
    tolerance = TOLERANCE[torch.float32] if dtype == torch.float32 else {"rtol": 2**-16, "atol": 1e-5}
    torch.testing.assert_close(found.double(), expected.values, **tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_negative_scores_and_of_nan(dtype):
    inputs, weight = draw(3, 16, dtype=dtype), draw(64, 16, seed=1, dtype=dtype)
    bias = torch.full((64,), -100.0, device=inputs.device)
    inputs[1, 2] = float("nan")
    columns, found = exact_topk.topk_scores(inputs, weight, bias, 4, 8, "ieee", COLUMNS)
    expected = scores_of(inputs, weight, bias).topk(4, dim=-1).indices
    assert torch.equal(columns[[0, 2]], expected[[0, 2]]) and (found[[0, 2]] < -50).all()
    # Every score of a row with NaN is NaN, and the lowest column wins a tie.
    assert found[1].isnan().all() and columns[1].tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("nan", [float("nan"), -float("nan")])
def test_nan_is_larger_than_any_number(nan):
    inputs, weight = draw(4, 16), draw(96, 16, seed=1)
    bias = torch.zeros(96, device=inputs.device)
    bias[41], bias[90] = nan, float("inf")
    columns, found = exact_topk.topk_scores(inputs, weight, bias, 3, 8, "ieee", COLUMNS)
    assert (columns[:, 0] == 41).all() and found[:, 0].isnan().all() and (columns[:, 1] == 90).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_lowest_column_wins_a_tie(dtype):
    # Whole numbers are exact in every dtype, and every third feature is the same.
    inputs = draw(5, 16).round().to(dtype)
    weight = draw(3, 16, seed=1).round().to(dtype).repeat(32, 1)
    bias = torch.zeros(96, device=inputs.device)
    columns, _ = exact_topk.topk_scores(inputs, weight, bias, 7, 8, "ieee", COLUMNS)
    order = scores_of(inputs, weight, bias).sort(dim=-1, descending=True, stable=True).indices
    assert torch.equal(columns, order[:, :7])


def test_a_tile_with_too_many_of_the_top_is_found_and_ranked_again(monkeypatch):
    inputs, weight, bias = draw(6, 16), draw(128, 16, seed=1), draw(128, seed=2)
    # All of the top of two rows lie in one tile of columns, and more of them than it keeps.
    weight[32:64] = inputs[2] * 4
    weight[:32] = inputs[5] * 4
    calls = []
    ranked = exact_topk._ranked_keys

    def spy(rows, *args):
        calls.append(len(rows))
        return ranked(rows, *args)

    monkeypatch.setattr(exact_topk, "_ranked_keys", spy)
    columns, found = exact_topk.topk_scores(inputs, weight, bias, 8, 4, "ieee", COLUMNS)
    expected = scores_of(inputs, weight, bias).topk(8, dim=-1)
    torch.testing.assert_close(found.double(), expected.values, rtol=1e-5, atol=1e-5)
    assert torch.equal(columns.sort().values, expected.indices.sort().values)
    assert len(calls) == 1 and 2 <= calls[0] < 6


def test_no_uncertified_row_is_wrong(monkeypatch):
    """With far too few scores kept of a tile, most rows are wrong, and every wrong one fails the certificate."""
    inputs, weight, bias = draw(48, 16), draw(128, 16, seed=1), draw(128, seed=2)
    expected = scores_of(inputs, weight, bias).topk(12, dim=-1).indices
    wrong = []

    def leave(rows, *args):
        failed = (inputs[:, None] == rows).all(-1).any(1)
        wrong.append(failed)
        return torch.zeros(len(rows), 12, dtype=torch.long, device=inputs.device)

    monkeypatch.setattr(exact_topk, "_ranked_keys", leave)
    columns, _ = exact_topk.topk_scores(inputs, weight, bias, 12, 4, "ieee", COLUMNS)
    (failed,) = wrong
    assert 0 < failed.sum() < len(inputs)
    assert torch.equal(columns[~failed], expected[~failed])


def test_features_are_ranked_in_blocks(monkeypatch):
    monkeypatch.setattr(exact_topk, "_FEATURES", 10)
    monkeypatch.setattr(exact_topk, "_SCORES", 40)
    inputs, weight, bias = draw(9, 16), draw(33, 16, seed=1), draw(33, seed=2)
    keys = exact_topk._ranked_keys(inputs, weight, bias, 12)
    assert torch.equal(exact_topk.columns_of(keys), scores_of(inputs, weight, bias).topk(12, dim=-1).indices)


@pytest.mark.parametrize(
    "features, k, kept",
    [(24576, 32, 8), (24576, 128, 16), (131072, 64, 8), (131072, 8, 4), (4608, 64, 16), (512, 64, None)],
)
def test_how_many_scores_a_tile_keeps(features, k, kept):
    assert exact_topk.kept_of_a_tile(k, features) == kept


def test_keys_sort_as_scores_do():
    scores = torch.tensor([[-torch.inf, -3.5, -1e-40, -0.0, 0.0, 1e-40, 2.0, torch.inf, torch.nan]])
    keys = exact_topk.keys_of(scores)
    assert keys[0].tolist() == sorted(keys[0].tolist())
    assert (
        torch.equal(exact_topk.scores_of(keys)[0, :-1], scores[0, :-1]) and exact_topk.scores_of(keys)[0, -1].isnan()
    )
    assert exact_topk.columns_of(keys).tolist() == [list(range(9))]
    negative_nan = torch.tensor([[-torch.nan]])
    assert exact_topk.scores_of(exact_topk.keys_of(negative_nan)).isnan().all()


def test_the_same_bits_every_time():
    inputs, weight, bias = draw(16, 32), draw(64, 32, seed=1), draw(64, seed=2)
    first, second = (exact_topk.topk_scores(inputs, weight, bias, 5, 8, "ieee", COLUMNS) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
