"""Each row gives the activations of its text alone, however it is padded."""

import pytest
import torch
from datasets import Dataset

from hf_transcoders import TranscoderError
from hf_transcoders.data import ActivationHarvester, ActivationStream
from tests.texts import MODELS, PADDINGS, alone, make_model, make_texts, padded
from tests.tiny_models import tiny_model


SITES = ["layers.1.mlp.in", "layers.2.mlp.branch"]
TEXTS = make_texts(12, 9, 6, 12, 1, 7, 10)


def activations_alone(model, site, skip_first):
    return torch.cat([alone(model, text, site)[1][skip_first:] for text in TEXTS])


def assert_same_rows(found, expected):
    """The same rows in any order."""
    assert len(found) == len(expected)
    # Without a product of matrices, whose differences of large numbers are not exact.
    distances = (found[:, None] - expected).norm(dim=-1)
    scale = expected.norm(dim=1).mean()
    assert distances.min(1).values.max() < 1e-4 * scale and distances.min(0).values.max() < 1e-4 * scale


@pytest.mark.parametrize("name", MODELS)
def test_harvested_activations_are_those_of_each_text_alone(name):
    model = make_model(name)
    expected = {site: activations_alone(name, site, 2) for site in SITES}
    for how in PADDINGS:
        rows = [*padded(TEXTS, how), {"input_ids": []}, {"input_ids": [5, 6], "attention_mask": [0, 0]}]
        harvester = ActivationHarvester(model, rows, SITES, rows_per_chunk=5, skip_first=2, outlier_factor=None)
        chunks = [harvester.chunk(number) for number in range(harvester.num_chunks)]
        for site in SITES:
            assert_same_rows(torch.cat([chunk[site] for chunk in chunks]), expected[site])


def test_padding_changes_no_bit():
    """Rows that say the same are run in the same way, so that a run on them is the same run."""
    model = tiny_model("gpt2")
    chunks = []
    for how in PADDINGS:
        harvester = ActivationHarvester(model, padded(TEXTS, how), SITES, rows_per_chunk=4)
        chunks.append([harvester.chunk(number) for number in range(harvester.num_chunks)])
    for other in chunks[1:]:
        for chunk, first in zip(other, chunks[0], strict=True):
            assert all(torch.equal(chunk[site], first[site]) for site in SITES)


def test_special_tokens_are_left_out_of_padded_rows():
    model = tiny_model("llama")
    texts = [[5, 9, 7, 9], [9, 5], [6, 9, 9, 8, 4]]
    harvester = ActivationHarvester(
        model, padded(texts, "left"), SITES, rows_per_chunk=3, special_token_ids=[9], outlier_factor=None
    )
    expected = [alone(model, text, SITES[0])[1][[i for i in range(1, len(text)) if text[i] != 9]] for text in texts]
    assert_same_rows(harvester.chunk(0)[SITES[0]], torch.cat(expected))


def test_chunks_without_any_token_are_empty():
    model = tiny_model("llama")
    harvester = ActivationHarvester(model, [{"input_ids": []}, {"input_ids": [4, 4], "attention_mask": [0, 0]}], SITES)
    assert {site: tuple(value.shape) for site, value in harvester.chunk(0).items()} == dict.fromkeys(SITES, (0, 32))


@pytest.mark.parametrize("streaming", [False, True])
def test_formats_and_streams(streaming):
    model = tiny_model("llama")
    dataset = Dataset.from_list(padded(TEXTS, "left")).with_format("torch")
    dataset = dataset.to_iterable_dataset() if streaming else dataset
    harvester = ActivationHarvester(model, dataset, SITES, rows_per_chunk=4, outlier_factor=None)
    found = torch.cat([chunk[SITES[0]] for chunk in harvester.chunks(range(2))])
    assert_same_rows(found, activations_alone(model, SITES[0], 1))


@pytest.mark.parametrize("how", ["right", "left"])
def test_a_stream_hands_out_tokens_of_texts_only(how):
    model = tiny_model("gpt2")
    harvester = ActivationHarvester(model, padded(TEXTS, how), SITES, rows_per_chunk=3, outlier_factor=None)
    stream = iter(ActivationStream(harvester, batch_size=5, buffer_tokens=50))
    # An epoch is 50 tokens.
    found = torch.cat([next(stream)[SITES[0]] for _ in range(10)])
    assert_same_rows(found, activations_alone(model, SITES[0], 1))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"input_ids": [5, 128]}, r"Row 1 has token 128, which the model does not know \(its tokens are 0 to 127\)"),
        ({"input_ids": [5, -1]}, "Row 1 has token -1, which the model does not know"),
        ({"input_ids": [5] * 65}, "Row 1 has 65 tokens and the model's context 64: shorten it"),
        ({"input_ids": [5, 6], "attention_mask": [1]}, "Row 1 has 2 tokens and an `attention_mask` of shape"),
    ],
)
@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_refused(family, row, message):
    harvester = ActivationHarvester(tiny_model(family), [{"input_ids": [5, 6]}, row], SITES)
    with pytest.raises(TranscoderError, match=message):
        harvester.chunk(0)


def test_ids_under_the_mask_do_not_matter():
    model = tiny_model("llama")
    row = {"input_ids": [-100, 5, 6, 7, 999], "attention_mask": [0, 1, 1, 1, 0]}
    chunk = ActivationHarvester(model, [row], SITES, outlier_factor=None).chunk(0)
    assert_same_rows(chunk[SITES[0]], alone(model, [5, 6, 7], SITES[0])[1][1:])


def test_rotary_positions_may_go_on_beyond_the_context():
    model = tiny_model("llama")
    (text,) = make_texts(70)
    chunk = ActivationHarvester(model, [{"input_ids": text}], SITES, outlier_factor=None).chunk(0)
    assert_same_rows(chunk[SITES[0]], alone(model, text, SITES[0])[1][1:])
