"""One pass over a dataset counts its tokens and gives a digest of all of them, however the rows are stored."""

import datasets
import numpy as np
import pytest
import torch

from hf_transcoders import TranscoderError
from hf_transcoders.data.row_facts import RowDigest, dataset_digest, scan_rows


ROWS = [[5, 6, 7, 8], [9], [3, 4, 5], [], [6, 2, 7]]


def padded(side):
    longest = max(map(len, ROWS))
    fill = [[0] * (longest - len(row)) for row in ROWS]
    join = (lambda row, more: more + row) if side == "left" else (lambda row, more: row + more)
    return [
        {"input_ids": join(row, more), "attention_mask": join([1] * len(row), [0] * len(more))}
        for row, more in zip(ROWS, fill, strict=True)
    ]


plain = [{"input_ids": row} for row in ROWS]
FORMS = {
    "list": plain,
    "arrays": [{"input_ids": np.array(row, dtype=np.int32)} for row in ROWS],
    "tensors": [{"input_ids": torch.tensor(row, dtype=torch.long)} for row in ROWS],
    "padded right": padded("right"),
    "padded left": padded("left"),
    "dataset": datasets.Dataset.from_list(plain),
    "padded dataset": datasets.Dataset.from_list(padded("left")),
    "torch format": datasets.Dataset.from_list(plain).with_format("torch"),
    "int32 dataset": datasets.Dataset.from_list(plain).cast_column(
        "input_ids", datasets.List(datasets.Value("int32"))
    ),
    "joined": datasets.concatenate_datasets(
        [datasets.Dataset.from_list(plain[:2]), datasets.Dataset.from_list(plain[2:])]
    ),
    "selected": datasets.Dataset.from_list(plain[::-1]).select([4, 3, 2, 1, 0]),
    "transformed": datasets.Dataset.from_list(plain).with_transform(
        lambda batch: {"input_ids": [list(ids) for ids in batch["input_ids"]]}
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_the_same_texts_have_the_same_facts(form):
    found = scan_rows(FORMS[form], skip_first=1, special_token_ids=[2, 5])
    assert found == scan_rows(plain, skip_first=1, special_token_ids=[2, 5])
    assert (found.rows, found.tokens) == (5, 11)
    # 6 7 8 | | 4 | | 7: without the first of each row, and without 5 and 2.
    assert found.kept == 5


def test_portions_do_not_matter(monkeypatch):
    expected = scan_rows(FORMS["padded dataset"])
    monkeypatch.setattr("hf_transcoders.data.row_facts._ROWS", 2)
    assert scan_rows(FORMS["padded dataset"]) == scan_rows(plain) == expected


def test_every_token_and_every_border_counts():
    changes = [
        [[5, 6, 7, 9], *ROWS[1:]],
        [[5, 6, 7], [8, 9], *ROWS[2:]],
        [*ROWS[:3], *ROWS[4:]],
        [*ROWS[::-1]],
        [*ROWS, []],
    ]
    digests = [scan_rows([{"input_ids": row} for row in rows]).digest for rows in (ROWS, *changes)]
    assert len(set(digests)) == len(digests)


def test_a_mask_in_the_middle_counts():
    rows = padded("right")
    rows[0]["attention_mask"] = [1, 0, 1, 1]
    assert scan_rows(rows).digest == scan_rows([{"input_ids": [5, 7, 8]}, *plain[1:]]).digest
    assert scan_rows(datasets.Dataset.from_list(rows)) == scan_rows(rows)


def test_rows_of_a_stream_are_added_as_they_are_read():
    digest = RowDigest()
    assert list(digest.watch(plain)) == plain
    assert digest.digest() == scan_rows(plain).digest
    half = RowDigest()
    next(iter(half.watch(plain)))
    assert half.digest() == scan_rows(plain[:1]).digest


def test_what_is_no_number_is_refused():
    with pytest.raises(TranscoderError, match="whole numbers in a list"):
        scan_rows([{"input_ids": [0.5, 1.5]}])


def test_of_several_datasets_and_of_texts():
    texts = datasets.Dataset.from_dict({"text": ["one", "two"]})
    assert dataset_digest(texts) == dataset_digest([{"text": "one"}, {"text": "two"}])
    assert dataset_digest(texts) != dataset_digest([{"text": "onet"}, {"text": "wo"}])
    assert dataset_digest({"a": plain}) == {"a": scan_rows(plain).digest}
    assert dataset_digest(iter(plain)) is None
