import pytest
import torch

from hf_transcoders.ops import batch_topk, topk


def draw(kind, rows, columns, seed):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(rows, columns, generator=generator)
    if kind == "tied":
        return (scores * 2).round()
    if kind == "negative":
        return -scores.abs() - 0.1
    if kind == "constant":
        return torch.full_like(scores, 0.5)
    if kind == "few_positive":
        return torch.where(scores > 1.5, scores, -scores.abs())
    return scores


KINDS = ["random", "tied", "negative", "constant", "few_positive"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "rows, columns, k",
    [(5, 64, 3), (5, 64, 4), (5, 64, 5), (1, 8, 1), (3, 7, 7), (4, 63, 2), (4, 4096, 32), (2, 1, 1), (6, 520, 32)],
)
def test_topk_chooses_the_values_that_torch_chooses(kind, rows, columns, k):
    for seed in range(3):
        scores = draw(kind, rows, columns, seed)
        chosen = topk(scores, k)
        assert all(len(set(row)) == k for row in chosen.tolist())
        values = scores.gather(1, chosen).sort(dim=-1, descending=True).values
        assert torch.equal(values, scores.topk(k, dim=-1).values)


def test_topk_of_a_bfloat16_tensor_and_of_a_slice():
    scores = torch.randn(6, 128, generator=torch.Generator().manual_seed(0))
    for view in (scores.bfloat16(), scores[:, ::2], scores.t().contiguous().t()):
        values = view.gather(1, topk(view, 4)).sort(dim=-1, descending=True).values
        assert torch.equal(values, view.topk(4, dim=-1).values)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "rows, columns, total",
    [(5, 64, 15), (1, 8, 1), (3, 7, 21), (64, 128, 256), (200, 200, 100), (200, 200, 4000), (0, 8, 0), (4, 16, 0)],
)
def test_batch_topk_chooses_the_largest_positive_scores_of_the_batch(kind, rows, columns, total):
    for seed in range(3):
        scores = draw(kind, rows, columns, seed)
        offsets, indices = batch_topk(scores, total)
        assert offsets.tolist()[0] == 0 and offsets.numel() == rows + 1 and offsets[-1] == indices.numel()
        row_numbers = torch.repeat_interleave(torch.arange(rows), offsets.diff())
        pairs = list(zip(row_numbers.tolist(), indices.tolist(), strict=True))
        assert len(set(pairs)) == len(pairs)
        expected = scores.flatten().topk(total).values
        expected = expected[expected > 0]
        assert torch.equal(scores[row_numbers, indices].sort(descending=True).values, expected)


def test_batch_topk_ranks_everything_when_the_sample_misleads():
    # Every 61st score, which the first guess is made from, is huge: too few of the others pass it.
    scores = torch.rand(100, 122, generator=torch.Generator().manual_seed(0)) + 0.1
    scores.view(-1)[::61] += 100.0
    offsets, indices = batch_topk(scores, 2000)
    row_numbers = torch.repeat_interleave(torch.arange(100), offsets.diff())
    chosen = scores[row_numbers, indices].sort(descending=True).values
    assert torch.equal(chosen, scores.flatten().topk(2000).values)


@pytest.mark.parametrize("rows, columns, total", [(3, 8, 4), (200, 200, 100), (200, 200, 4000)])
def test_batch_topk_chooses_nan_before_any_number(rows, columns, total):
    scores = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))
    scores[1, 3] = scores[2, 7] = float("nan")
    offsets, indices = batch_topk(scores, total)
    chosen = scores[torch.repeat_interleave(torch.arange(rows), offsets.diff()), indices]
    assert chosen.isnan().sum() == 2 and chosen.numel() <= total
    assert torch.equal(
        chosen.nan_to_num(0).sort(descending=True).values[:-2],
        scores.nan_to_num(0).flatten().topk(total - 2).values.relu(),
    )
