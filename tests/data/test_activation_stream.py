"""The stream loses nothing, mixes everything and resumes bit for bit."""

import itertools
import json

import pytest
import torch

from hf_transcoders import TranscoderError
from hf_transcoders.data import ActivationHarvester, ActivationStream
from tests.data.test_harvest import SITES, token_rows
from tests.tiny_models import tiny_model


@pytest.fixture(scope="module")
def model():
    return tiny_model("gpt2")


def make_stream(model, rows=23, batch_size=8, buffer_tokens=40, dataset=None, **changes):
    harvester = ActivationHarvester(model, dataset or token_rows(rows), SITES, rows_per_chunk=3, outlier_factor=None)
    return ActivationStream(harvester, batch_size=batch_size, buffer_tokens=buffer_tokens, **changes)


def take(stream, count):
    return list(itertools.islice(stream, count))


def same(a, b):
    return all(torch.equal(x[site], y[site]) for x, y in zip(a, b, strict=True) for site in SITES)


def rounded(vectors):
    return sorted(tuple(round(v, 4) for v in row[:4].tolist()) for row in vectors)


def test_every_activation_of_an_epoch_comes_exactly_once(model):
    # 16 rows x 9 tokens = 144 = 18 batches of 8 = 3 blocks of 48, while a chunk has 27 tokens.
    stream = make_stream(model, rows=16, buffer_tokens=48)
    got = torch.cat([batch[SITES[0]] for batch in take(stream, 18)])
    chunks = stream.harvester
    expected = torch.cat([chunks.chunk(i)[SITES[0]] for i in range(chunks.num_chunks)])
    assert rounded(got) == rounded(expected)


def test_inputs_and_outputs_stay_together(model):
    stream = make_stream(model)
    pairs = {}
    for i in range(stream.harvester.num_chunks):
        chunk = stream.harvester.chunk(i)
        pairs |= {tuple(x.tolist()): y for x, y in zip(chunk[SITES[0]], chunk[SITES[1]], strict=True)}
    for batch in take(stream, 12):
        for x, y in zip(batch[SITES[0]], batch[SITES[1]], strict=True):
            assert torch.equal(pairs[tuple(x.tolist())], y)


def test_batches_are_mixed_over_rows(model):
    harvester = ActivationHarvester(model, token_rows(23), SITES, rows_per_chunk=3, outlier_factor=None)
    row_of = {}
    for i in range(harvester.num_chunks):
        chunk = harvester.chunk(i)[SITES[0]]
        row_of |= {tuple(v.tolist()): (i, t // 9) for t, v in enumerate(chunk)}
    batch = take(ActivationStream(harvester, batch_size=8, buffer_tokens=80), 1)[0]
    assert len({row_of[tuple(v.tolist())] for v in batch[SITES[0]]}) >= 4


def test_the_seed_decides_the_order_and_epochs_differ(model):
    a, b, c = (make_stream(model, rows=16, seed=s) for s in (0, 0, 1))
    first, second, third = (take(s, 36) for s in (a, b, c))
    assert same(first, second)
    assert not same(first, third)
    assert not same(first[:18], first[18:])


@pytest.mark.parametrize("stop", [0, 1, 4, 5, 6, 17, 23, 30, 45])
def test_resume_continues_bit_for_bit(model, stop):
    straight = take(make_stream(model), 60)
    stream = make_stream(model)
    take(stream, stop)
    state = json.loads(json.dumps(stream.state_dict()))
    resumed = make_stream(model)
    resumed.load_state_dict(state)
    assert same(take(resumed, 60 - stop), straight[stop:])


def test_resume_counts_the_batch_in_use_as_gone(model):
    straight = take(make_stream(model), 10)
    iterator = iter(stream := make_stream(model))
    for _ in range(7):
        next(iterator)
    state = stream.state_dict()  # While the seventh batch is in use.
    resumed = make_stream(model)
    resumed.load_state_dict(state)
    assert same(take(resumed, 3), straight[7:])


def test_sampling_uses_nothing_up(model):
    plain, sampled = make_stream(model), make_stream(model)
    assert sampled.sample(20)[SITES[0]].shape == (20, 32)
    assert same(take(plain, 12), take(sampled, 12))


def test_ranks_read_different_text_and_together_all_of_it(model):
    # Each has 12 rows x 9 tokens = 108 = 12 batches of 9 = 4 blocks of 27.
    ranks = [make_stream(model, rows=24, batch_size=9, buffer_tokens=27, shard=r, num_shards=2) for r in (0, 1)]
    seen = [rounded(torch.cat([b[SITES[0]] for b in take(stream, 12)])) for stream in ranks]
    harvester = ranks[0].harvester
    assert sorted(seen[0] + seen[1]) == rounded(torch.cat([harvester.chunk(i)[SITES[0]] for i in range(8)]))


def test_streamed_datasets_resume_too(model):
    class Streamed:
        def __iter__(self):
            return iter(token_rows(23))

    straight = take(make_stream(model, dataset=Streamed()), 50)
    stream = make_stream(model, dataset=Streamed())
    take(stream, 31)
    resumed = make_stream(model, dataset=Streamed())
    resumed.load_state_dict(stream.state_dict())
    assert same(take(resumed, 19), straight[31:])


def test_streamed_ranks_share_the_chunks_out(model):
    class Streamed:
        def __iter__(self):
            return iter(token_rows(24))

    ranks = [make_stream(model, dataset=Streamed(), shard=r, num_shards=2) for r in (0, 1)]
    seen = [set(rounded(torch.cat([b[SITES[0]] for b in take(stream, 13)]))) for stream in ranks]
    assert not seen[0] & seen[1]


def test_too_short_text_is_refused_with_the_numbers(model):
    with pytest.raises(TranscoderError, match=r"2 rows of 10 tokens leave 18 activations.*batch of 32"):
        make_stream(model, rows=2, batch_size=32)


def test_everything_masked_is_refused_instead_of_running_forever(model):
    rows = [{"input_ids": [7] * 10} for _ in range(6)]
    harvester = ActivationHarvester(model, rows, SITES, special_token_ids=[7])
    with pytest.raises(TranscoderError, match="gives no activations"):
        next(iter(ActivationStream(harvester, batch_size=4)))


def test_another_setting_is_refused_on_resume(model):
    state = make_stream(model).state_dict()
    with pytest.raises(TranscoderError, match="block tokens 40 and this run has 20"):
        make_stream(model, batch_size=4, buffer_tokens=20).load_state_dict(state)
