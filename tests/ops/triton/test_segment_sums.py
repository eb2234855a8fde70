"""Weighted sums of rows over segments of pairs, against float64."""

import pytest
import torch

from hf_transcoders.ops.pairs import SharedOrder

from .kernel_cases import DEVICE, DTYPES, PAIRS, TOLERANCE, dense_of, draw, draw_pairs


segment_sums = pytest.importorskip("hf_transcoders.ops.triton.segment_sums")
pairs_triton = pytest.importorskip("hf_transcoders.ops.triton.pairs_triton")

ROWS, FEATURES = 12, 20


def sums(offsets, sources, values, table, piece=256):
    segments = segment_sums.in_pieces(offsets, len(sources), piece)
    return segment_sums.segment_sums(segments, sources, values, table, piece)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [16, 37])
@pytest.mark.parametrize("kind", PAIRS)
def test_sums_over_rows(kind, width, dtype):
    offsets, indices = draw_pairs(kind, ROWS, FEATURES)
    values, table = draw(len(indices), dtype=dtype), draw(FEATURES, width, seed=1, dtype=dtype)
    out = sums(offsets, indices, values, table)
    assert out.dtype == dtype
    expected = dense_of(offsets, indices, values, FEATURES) @ table.double()
    torch.testing.assert_close(out.double(), expected, **TOLERANCE[dtype])


def test_a_wide_table_takes_several_programs_a_row():
    offsets, indices = draw_pairs("ragged", 4, FEATURES)
    values, table = draw(len(indices)), draw(FEATURES, 600, seed=1)
    expected = dense_of(offsets, indices, values, FEATURES) @ table.double()
    torch.testing.assert_close(sums(offsets, indices, values, table).double(), expected, rtol=1e-5, atol=1e-5)


def test_values_in_full_precision_beside_a_table_in_low():
    offsets, indices = draw_pairs("equal", ROWS, FEATURES)
    values, table = draw(len(indices)), draw(FEATURES, 16, seed=1, dtype=torch.bfloat16)
    out = sums(offsets, indices, values, table)
    assert out.dtype == torch.float32
    expected = dense_of(offsets, indices, values, FEATURES) @ table.double()
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("piece", [1, 4, 7, 64])
def test_long_segments_are_summed_in_pieces(piece):
    counts = torch.tensor([0, 30, 1, 0, 0, 8, 7, 0, 21, 0])
    offsets = torch.cat([torch.zeros(1, dtype=torch.long), counts.cumsum(0)]).to(DEVICE)
    sources = torch.randint(0, 9, (int(counts.sum()),), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    values, table = draw(len(sources)), draw(9, 16, seed=1)
    out = sums(offsets, sources, values, table, piece)
    parts = (values.double()[:, None] * table.double()[sources]).split(counts.tolist())
    torch.testing.assert_close(out.double(), torch.stack([part.sum(0) for part in parts]), rtol=1e-5, atol=1e-5)


def test_pieces_belong_to_their_segments():
    segments = segment_sums.in_pieces(torch.tensor([0, 0, 5, 6, 10, 10]), 10, 2)
    # 5 pairs are three pieces, the first of which is the segment's own; 4 pairs are two.
    assert segments.owners.tolist() == [1, 1, 3, 5, 5] and segments.piece_offsets.tolist() == [0, 0, 2, 2, 3, 3]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", PAIRS)
def test_gradients_of_weights_by_feature(kind, dtype):
    offsets, indices = draw_pairs(kind, ROWS, FEATURES)
    values, rows, order = draw(len(indices), dtype=dtype), draw(ROWS, 16, seed=1, dtype=dtype), SharedOrder()
    dense = dense_of(offsets, indices, values, FEATURES)
    out = pairs_triton.TritonPairSums.scatter_rows(offsets, indices, values, rows, FEATURES, order)
    torch.testing.assert_close(out.double(), dense.T @ rows.double(), **TOLERANCE[dtype])
    totals = pairs_triton.TritonPairSums.scatter_values(offsets, indices, values, FEATURES, order)
    torch.testing.assert_close(totals.double(), dense.sum(0), **TOLERANCE[dtype])


def test_one_feature_on_all_rows_is_split():
    offsets, indices = draw_pairs("shared", 600, FEATURES)
    values, rows = draw(len(indices)), draw(600, 16, seed=1)
    _, segments, _ = pairs_triton.by_feature(offsets, indices, FEATURES)
    assert segments.owners.tolist() == [7, 7, FEATURES, FEATURES]
    out = pairs_triton.TritonPairSums.scatter_rows(offsets, indices, values, rows, FEATURES, SharedOrder())
    expected = dense_of(offsets, indices, values, FEATURES).T @ rows.double()
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-4)


def test_the_same_bits_every_time():
    offsets, indices = draw_pairs("shared", 40, FEATURES)
    values, rows = draw(len(indices)), draw(40, 16, seed=1)
    first, second = (
        pairs_triton.TritonPairSums.scatter_rows(offsets, indices, values, rows, FEATURES, SharedOrder())
        for _ in range(2)
    )
    assert torch.equal(first, second)
