"""Which activations reach a dictionary, and that a chunk is always the same."""

import math

import pytest
import torch
from safetensors.torch import load_file

from hf_transcoders import TranscoderError, capture
from hf_transcoders.data import ActivationHarvester
from tests.tiny_models import VOCAB_SIZE, tiny_model


SITES = ["layers.1.mlp.in", "layers.1.mlp.branch"]


def token_rows(count, length=10, seed=0):
    ids = torch.randint(3, VOCAB_SIZE, (count, length), generator=torch.Generator().manual_seed(seed))
    return [{"input_ids": row.tolist()} for row in ids]


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama")


def test_chunk_holds_the_activations_of_its_rows_without_the_first_position(model):
    rows = token_rows(7)
    harvester = ActivationHarvester(model, rows, SITES, rows_per_chunk=4, outlier_factor=None)
    order = torch.randperm(7, generator=torch.Generator().manual_seed(0)).tolist()
    assert harvester.num_chunks == 2
    for number, members in enumerate((order[:4], order[4:])):
        ids = torch.tensor([rows[i]["input_ids"] for i in members])
        with torch.no_grad(), capture(model, SITES) as activations:
            model(ids)
        chunk = harvester.chunk(number)
        for site in SITES:
            assert torch.equal(chunk[site], activations[site][:, 1:].reshape(-1, activations[site].shape[-1]))


def test_special_tokens_and_padding_are_left_out(model):
    rows = [
        {"input_ids": [5, 6, 2, 7, 8], "attention_mask": [1, 1, 1, 1, 1]},
        {"input_ids": [5, 9, 4], "attention_mask": [1, 1, 1]},
    ]
    harvester = ActivationHarvester(model, rows, SITES, special_token_ids=[2], outlier_factor=None)
    # Positions 1, 3, 4 of the long row and 1, 2 of the short one.
    assert harvester.chunk(0)[SITES[0]].shape[0] == 5
    with torch.no_grad(), capture(model, SITES) as activations:
        model(torch.tensor([[5, 9, 4]]))
    kept = harvester.chunk(0)[SITES[0]]
    alone = activations[SITES[0]][0, 1:]
    distances = torch.cdist(alone, kept).min(-1).values
    assert distances.max() < 1e-5


def test_outliers_are_left_out_at_every_site(model):
    rows = token_rows(4)
    everything = ActivationHarvester(model, rows, SITES, rows_per_chunk=4, outlier_factor=None).chunk(0)
    factor = 1.2
    kept = ActivationHarvester(model, rows, SITES, rows_per_chunk=4, outlier_factor=factor).chunk(0)
    inside = torch.ones(everything[SITES[0]].shape[0], dtype=torch.bool)
    for site in SITES:
        norms = everything[site].norm(dim=-1)
        inside &= norms <= factor * norms.median()
    assert 0 < inside.sum() < inside.numel()
    for site in SITES:
        assert torch.equal(kept[site], everything[site][inside])


def test_not_a_number_is_refused_with_the_site(model):
    broken = tiny_model("llama")
    with torch.no_grad():
        broken.model.layers[1].mlp.down_proj.weight[0, 0] = math.nan
    harvester = ActivationHarvester(broken, token_rows(2), SITES)
    with pytest.raises(TranscoderError, match=r"layers\.1\.mlp\.branch contain NaN"):
        harvester.chunk(0)


def test_empty_dataset_is_refused(model):
    with pytest.raises(TranscoderError, match="no rows"):
        ActivationHarvester(model, [], SITES)


class CountingModel:
    """Counts forwards of a model by a hook on its first block."""

    def __init__(self, model):
        self.calls = 0
        self.handle = model.model.layers[0].register_forward_hook(self._count)

    def _count(self, *_):
        self.calls += 1


def test_memory_cache_answers_without_the_model_and_respects_its_size(model):
    counter = CountingModel(model)
    one_chunk = 4 * 9 * 32 * 4 * 2
    harvester = ActivationHarvester(
        model, token_rows(8), SITES, rows_per_chunk=4, outlier_factor=None, memory_cache_bytes=one_chunk
    )
    first = [harvester.chunk(i) for i in (0, 1)]
    again = [harvester.chunk(i) for i in (0, 1)]
    counter.handle.remove()
    assert counter.calls == 3  # Only the first chunk fits.
    for a, b in zip(first, again, strict=True):
        assert all(torch.equal(a[site], b[site]) for site in SITES)


def test_disk_cache_serves_another_run_and_heals_a_cut_file(model, tmp_path):
    def make(**changes):
        return ActivationHarvester(model, token_rows(8), SITES, rows_per_chunk=4, cache_dir=tmp_path, **changes)

    fresh = make().chunk(1)
    counter = CountingModel(model)
    cached = make().chunk(1)
    assert counter.calls == 0
    assert all(torch.equal(fresh[site], cached[site]) for site in SITES)

    # Everything that changes the activations changes the key.
    other = tiny_model("llama", seed=1)
    before = len(list(tmp_path.iterdir()))
    make(skip_first=2).chunk(1)
    make(seed=3).chunk(1)
    ActivationHarvester(other, token_rows(8), SITES, rows_per_chunk=4, cache_dir=tmp_path).chunk(1)
    ActivationHarvester(model, token_rows(8, seed=9), SITES, rows_per_chunk=4, cache_dir=tmp_path).chunk(1)
    assert len(list(tmp_path.iterdir())) == before + 4

    calls = counter.calls
    (path,) = (make()._cache_dir).glob("*.safetensors")
    path.write_bytes(path.read_bytes()[:100])
    healed = make().chunk(1)
    counter.handle.remove()
    assert counter.calls == calls + 1
    assert all(torch.equal(fresh[site], healed[site]) for site in SITES)
    assert set(load_file(path)) == set(SITES)
