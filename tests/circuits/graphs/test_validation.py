"""What edges predict is what ablations do, as long as everything else is held fast."""

import pytest
import torch

from hf_transcoders import TranscoderError
from hf_transcoders.circuits.graphs import attribution_graph, certificate, union
from tests.circuits.interventions.setups import random_dictionary
from tests.tiny_models import TINY_CONFIGS, tiny_model, tiny_tokens


def _graph(family, targets, **changes):
    model = tiny_model(family)
    transcoders = {
        f"t{i}": random_dictionary(model, f"layers.{i}.mlp.in", f"layers.{i}.mlp.out", seed=i, **changes)
        for i in range(3)
    }
    prompt = tiny_tokens(1)[0].tolist()
    return model, transcoders, attribution_graph(model, transcoders, prompt, targets=targets, progress=False)


@pytest.mark.parametrize("family", TINY_CONFIGS)
def test_direct_effects_are_the_edges(family):
    targets = [7, (5, 9), torch.linspace(-1, 1, 32)]
    model, transcoders, graph = _graph(family, targets, skip_connection=True)
    # Strong edges, for which rounding does not matter, into features and into every target.
    from_features = graph.is_kind("feature")[graph.source]
    into_target = graph.is_kind("target")[graph.target]
    chosen = []
    for part in (from_features & ~into_target, from_features & into_target):
        numbers = part.nonzero()[:, 0]
        chosen += numbers[graph.weight[numbers].abs().topk(12).indices].tolist()
    pairs = [(int(graph.source[number]), int(graph.target[number])) for number in chosen]
    found = certificate(model, transcoders, graph, pairs, batch_size=5)
    largest = found.predicted.abs().max()
    torch.testing.assert_close(found.measured["direct"], found.predicted, rtol=1e-3, atol=1e-5 * float(largest))
    # In the other modes the model answers, so that prediction and measurement are not the same thing twice.
    assert (found.measured["frozen"] - found.predicted).abs().max() > 1e-3 * largest
    assert (found.measured["free"] - found.measured["frozen"]).abs().max() > 1e-3 * largest
    summary = found.summary()
    assert summary["direct"]["sign_agreement"] == 1 and summary["direct"]["pearson"] > 0.9999
    assert summary["direct"]["relative_error"] < 1e-3 < summary["free"]["relative_error"]
    assert sum(entry["edges"] for entry in summary["free"]["by_depth"].values()) == len(pairs)
    assert graph.metadata["certificate"] == summary
    assert "all but the direct effect" in str(found) and len(found.to_dict()["edges"]) == len(pairs)


def test_edges_are_chosen_by_influence_and_by_chance():
    model, transcoders, graph = _graph("llama", None)
    found = certificate(model, transcoders, graph.prune(), 10, modes=["direct"])
    assert len(found.predicted) == 10 and set(found.measured) == {"direct"}
    assert len(set(zip(found.source.tolist(), found.target.tolist(), strict=True))) == 10
    again = certificate(model, transcoders, graph.prune(), 10, modes=["direct"])
    assert torch.equal(found.source, again.source)
    assert graph.prune().is_kind("feature")[found.source].all()


def test_what_cannot_be_certified_is_refused():
    model, transcoders, graph = _graph("llama", None)
    token = int(graph.is_kind("token").nonzero()[0])
    with pytest.raises(TranscoderError, match="out of a feature"):
        certificate(model, transcoders, graph, [(token, graph.num_nodes - 1)])
    with pytest.raises(TranscoderError, match="of at least 1"):
        certificate(model, transcoders, graph, 0)
    with pytest.raises(TranscoderError, match="direct, frozen, free"):
        certificate(model, transcoders, graph, 4, modes=["loose"])
    with pytest.raises(TranscoderError, match="'t2' too"):
        certificate(model, {name: transcoders[name] for name in ("t0", "t1")}, graph, 4)
    with pytest.raises(TranscoderError, match="several prompts"):
        certificate(model, transcoders, union([graph], align="feature"), 4)
