"""Mean contributions against a loop over tokens with frozen norms."""

import pytest
import torch

from hf_transcoders.circuits import FeatureWeights
from hf_transcoders.circuits.weights import mean_contributions as contributions
from hf_transcoders.lm import Site, capture
from hf_transcoders.lm.norms import frozen_norm
from hf_transcoders.lm.stream import norm_after, norm_before, stream_before
from hf_transcoders.models.linear_parts import decoder_rows, encoder_rows
from tests.circuits.weights.setups import dictionary, pair
from tests.tiny_models import TINY_CONFIGS, tiny_model, tiny_tokens


@pytest.mark.parametrize("only_active", [False, True])
@pytest.mark.parametrize("family", sorted(TINY_CONFIGS))
@torch.no_grad()
def test_means_equal_a_loop_over_tokens(monkeypatch, family, only_active):
    model = tiny_model(family)
    dictionaries = pair(model) | {"middle": dictionary(model, 1, 4, num_features=6)}
    ids, features, special = tiny_tokens(batch=5), [6, 0], [7, 8, 9]
    ids[1, 4], ids[3, 6] = 7, 9
    monkeypatch.setattr(contributions, "MAX_ELEMENTS", 50)
    found = FeatureWeights(model, dictionaries).mean_contributions(
        "late",
        features,
        [{"input_ids": row.tolist()} for row in ids],
        only_active=only_active,
        batch_size=2,
        skip_first=2,
        special_token_ids=special,
    )
    assert list(found.sources) == ["early", "middle"]

    into = Site("mlp.in", 2)
    outs = {"early": Site("mlp.out", 0), "middle": Site("mlp.out", 1)}
    stream = stream_before(model, into)
    sites = [into, stream, *outs.values(), *(Site("mlp.in", out.layer) for out in outs.values())]
    with capture(model, sites, stop=False) as activations:
        model(input_ids=ids)
        activations = {site: value.double() for site, value in activations.items()}
    model.double()
    reads = encoder_rows(dictionaries["late"])[0][features].double()
    fires = dictionaries["late"].encode(activations[into])[..., features] > 0
    sums = {name: torch.zeros(dictionaries[name].config.num_features, 2, dtype=torch.float64) for name in outs}
    counts = [0, 0]
    for row in range(5):
        for token in range(2, ids.shape[1]):
            if ids[row, token] in special:
                continue
            for j in range(2):
                counted = not only_active or fires[row, token, j]
                counts[j] += int(counted)
                for name, out in outs.items():
                    acts = dictionaries[name].encode(activations[Site("mlp.in", out.layer)][row, token])
                    written = decoder_rows(dictionaries[name]).double()
                    if (norm := norm_after(model, out)) is not None:
                        written = frozen_norm(norm, activations[out][row, token][None])(written)
                    arrived = frozen_norm(norm_before(model, into), activations[stream][row, token][None])(written)
                    sums[name][:, j] += counted * acts.double() * (arrived @ reads[j])
    assert found.tokens == counts and 0 < min(counts)
    for name in outs:
        means = sums[name] / torch.tensor(counts)
        torch.testing.assert_close(found.sources[name].contributions.double(), means, rtol=1e-3, atol=1e-4)
    best = found.top(0, k=3)
    assert len(best) == 3 and abs(best[0]["contribution"]) >= abs(best[1]["contribution"])
    largest = max(source.contributions[:, 1].abs().max().item() for source in found.sources.values())
    assert abs(best[0]["contribution"]) == pytest.approx(largest)
    chosen = found.sources[best[0]["dictionary"]]
    assert best[0]["strength"] == chosen.strengths[best[0]["feature"], 1].item()
    assert found.to_dict(k=2)["features"][1]["feature"] == 0
