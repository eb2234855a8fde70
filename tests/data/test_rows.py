"""What of a row counts, and what is refused."""

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict
from transformers import BatchEncoding

from hf_transcoders import TranscoderError
from hf_transcoders.data.rows import read_row, token_rows
from tests.texts import PADDINGS, make_texts, padded


TEXTS = make_texts(12, 9, 6, 1, 7, 3)


@pytest.mark.parametrize("how", PADDINGS)
def test_the_tokens_of_a_row_are_those_of_its_text(how):
    rows = padded(TEXTS, how)
    assert [read_row(row).tolist() for row in rows] == TEXTS


@pytest.mark.parametrize(
    "form",
    [list, tuple, np.array, torch.tensor, lambda x: torch.tensor([x]), lambda x: [x], lambda x: np.array(x, "int16")],
)
def test_lists_arrays_and_tensors(form):
    assert read_row({"input_ids": form([5, 6, 7]), "attention_mask": form([0, 1, 1])}).tolist() == [6, 7]
    assert read_row({"input_ids": form([5, 6, 7]), "attention_mask": np.array([True, False, True])}).tolist() == [5, 7]


@pytest.mark.parametrize("form", [None, "numpy", "torch", "arrow", "pandas"])
def test_every_format_of_a_dataset(form):
    rows = padded(TEXTS, "left")
    dataset = token_rows(Dataset.from_list(rows).with_format(form))
    assert [read_row(dataset[number]).tolist() for number in range(len(TEXTS))] == TEXTS
    assert [read_row(row).tolist() for row in token_rows(Dataset.from_list(rows).to_iterable_dataset())] == TEXTS


def test_a_transform_makes_the_rows():
    dataset = Dataset.from_dict({"words": [3, 4]}).with_transform(
        lambda batch: {"input_ids": [[n] * n for n in batch["words"]]}
    )
    assert [read_row(row).tolist() for row in token_rows(dataset)] == [[3, 3, 3], [4, 4, 4, 4]]


def test_what_a_tokenizer_returned_is_a_dataset_of_its_texts():
    batch = padded(TEXTS, "left")
    batch = BatchEncoding(
        {name: torch.tensor([row[name] for row in batch]) for name in ("input_ids", "attention_mask")}
    )
    assert [read_row(row).tolist() for row in token_rows(batch)] == TEXTS
    assert [read_row(row).tolist() for row in token_rows(BatchEncoding({"input_ids": [5, 6]}))] == [[5, 6]]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "a"}, "Row 3 has no column `input_ids` .it has text.: tokenize the text first"),
        ([5, 6], "Row 3 has no column `input_ids` .it is a list."),
        ({"input_ids": None}, "no column `input_ids`"),
        ({"input_ids": [1.5, 2.0]}, "whole numbers in a list, but row 3 has others"),
        ({"input_ids": ["a"]}, "row 3 has others"),
        ({"input_ids": [[1, 2], [3, 4]]}, r"row 3 has others of shape \(2, 2\)"),
        ({"input_ids": [[1, 2], [3]]}, "row 3 has others"),
        ({"input_ids": [1, 2, 3], "attention_mask": [1, 1]}, r"Row 3 has 3 tokens and an `attention_mask` of shape \(2,\)"),
        ({"input_ids": [1, 2], "attention_mask": [[1, 0], [1, 1]]}, r"of shape \(2, 2\): give one number for each token"),
        ({"input_ids": [1, 2], "attention_mask": [1, 2]}, "`attention_mask` of row 3 has 2 in it: give 1 for each token"),
        ({"input_ids": [1, 2], "attention_mask": [0.0, float("nan")]}, "has nan in it"),
    ],
)  # fmt: skip
def test_refused(row, message):
    with pytest.raises(TranscoderError, match=message):
        read_row(row, "Row 3")


@pytest.mark.parametrize(
    "several", [{}, {"train": [], "test": []}, DatasetDict({"train": Dataset.from_list([{"input_ids": [1]}])})]
)
def test_several_datasets_are_not_one(several):
    with pytest.raises(
        TranscoderError,
        match=r"not one dataset but a (dict|DatasetDict) of .*choose one, such as `dataset\['train'\]`",
    ):
        token_rows(several)
