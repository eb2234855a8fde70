import pytest
import torch
from datasets import Dataset

from hf_transcoders.errors import TranscoderError
from hf_transcoders.features.text_sample import sample_text


END, LENGTH = 0, 16


def packed_rows(lengths, seed=0):
    """Documents of these lengths, each followed by `END`, cut into rows; and the document of each token."""
    generator = torch.Generator().manual_seed(seed)
    tokens, documents = [], []
    for number, length in enumerate(lengths):
        tokens += [*torch.randint(1, 1000, (length,), generator=generator).tolist(), END]
        documents += [number] * (length + 1)
    rows = len(tokens) // LENGTH
    cut = [tokens[LENGTH * row : LENGTH * (row + 1)] for row in range(rows)]
    return cut, torch.tensor(documents[: rows * LENGTH]).view(rows, LENGTH)


def test_rows_come_from_all_of_the_dataset_by_the_seed():
    rows, _ = packed_rows([7] * 400)
    dataset = Dataset.from_dict({"input_ids": rows})
    draw = lambda seed: sample_text(dataset, max_tokens=20 * LENGTH, separator=END, seed=seed)  # noqa: E731
    sample = draw(0)
    assert len(sample.rows) == 20 and list(sample.rows) == sorted(set(sample.rows))
    assert min(sample.rows) < 40 and max(sample.rows) > 160
    assert [text.tolist() for text in sample.blocks.texts] == [rows[row] for row in sample.rows]
    assert draw(0).rows == sample.rows != draw(1).rows
    # All of a small dataset, and a stream from its start.
    assert list(sample_text(dataset, max_tokens=10**6).rows) == list(range(len(rows)))
    stream = sample_text(dataset.to_iterable_dataset(), max_tokens=20 * LENGTH, separator=END)
    assert list(stream.rows) == list(range(20))


@pytest.mark.parametrize("lengths", [[7] * 60, [3, 50, 100, 1, 40, 15, 16, 31] * 4, [15] * 40])
def test_documents_are_told_apart_across_rows(lengths):
    rows, documents = packed_rows(lengths)
    for most in (4 * LENGTH, 12 * LENGTH, 10**6):
        sample = sample_text([{"input_ids": row} for row in rows], max_tokens=most, separator=END)
        found, expected = sample.documents.flatten(), documents[list(sample.rows)].flatten()
        assert torch.equal(found[:, None] == found, expected[:, None] == expected)


def test_rows_without_separators_are_documents():
    rows = [{"input_ids": [1, 2, 3, 4]}, {"input_ids": [5, 6]}, {"input_ids": [7, 8, 9]}]
    sample = sample_text(rows, max_tokens=100, separator=END)
    assert [len(set(sample.documents[i, : len(text)].tolist())) for i, text in enumerate(sample.blocks.texts)] == [
        1
    ] * 3
    assert len(set(sample.documents[:, 0].tolist())) == 3


def test_contexts_are_equal_where_the_neighbors_are():
    text = torch.randint(1, 50, (40,)).tolist()
    other = [*text]
    other[20] = 77
    sample = sample_text([{"input_ids": text}, {"input_ids": other}, {"input_ids": text[3:]}], max_tokens=1000)
    one, changed, shifted = sample.contexts  # pyright: ignore[reportGeneralTypeIssues]
    assert torch.equal(one == changed, (torch.arange(40) - 20).abs() > 5)
    assert torch.equal(one[8:35], shifted[5:32])


def test_errors_name_the_row():
    rows = [{"input_ids": [1, 2, 3]}] * 7 + [{"text": "a"}]
    with pytest.raises(TranscoderError, match="Row 7 of the evaluation dataset has no column"):
        sample_text(rows, max_tokens=100)
    with pytest.raises(TranscoderError, match="is empty"):
        sample_text([], max_tokens=100)
