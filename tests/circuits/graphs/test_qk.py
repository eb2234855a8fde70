"""Pairs of sources sum to the score that the model itself computes, in every family."""

import json

import pytest
import torch

from hf_transcoders import TranscoderError
from hf_transcoders.circuits.graphs import attribution_graph, qk_attribution
from hf_transcoders.circuits.graphs.autograd import AutogradRows
from hf_transcoders.circuits.graphs.read_vectors import ReadVectors
from hf_transcoders.circuits.graphs.recording import record
from hf_transcoders.lm import edit_attention
from hf_transcoders.lm.query_key import linear_query_key
from tests.circuits.graphs.setups import mixes
from tests.lm.utils import hook_state
from tests.tiny_models import TINY_CONFIGS, tiny_model, tiny_tokens


HEADS = 4
# What scores are multiplied with in the tiny models, all with heads of 8 dimensions; OPT's queries have it in them.
SCALING = 8**-0.5


def score_of(model, prompt, layer, head, query_position, key_position):
    """The score from the model's own queries and keys, and how much the head looks there."""
    seen = {}

    def keep(name):
        return lambda tensor, at: seen.__setitem__((name, at), tensor[0].double())

    with torch.no_grad(), edit_attention(model, query=keep("query"), key=keep("key"), pattern=keep("pattern")):
        model(torch.tensor([prompt]))
    query, key = seen["query", layer][head, query_position], seen["key", layer]
    score = query @ key[head * len(key) // HEADS, key_position]
    scaling = 1.0 if model.config.model_type == "opt" else SCALING
    return float(score) * scaling, float(seen["pattern", layer][head, query_position, key_position])


@pytest.mark.parametrize("family", sorted(TINY_CONFIGS))
def test_pairs_and_marginals_sum_to_the_score(family):
    model, prompt = tiny_model(family), tiny_tokens(1, 9)[0].tolist()
    before = hook_state(model)
    for layer, head, query_position, key_position, mix in (
        (1, 2, 8, 5, "skips"),
        (2, 1, 6, 6, "attention"),
        (2, 3, -2, None, "SAEs of the stream"),
        (0, 0, 3, 0, "none"),
    ):
        result = qk_attribution(model, mixes(model)[mix], prompt, layer, head, query_position, key_position, top=10**6)
        expected, probability = score_of(model, prompt, layer, head, result.query_position, result.key_position)
        size = float(result.pair_score.abs().max()) + abs(expected)
        assert abs(result.score - expected) < 1e-4 * size
        assert result.probability == pytest.approx(probability, abs=1e-6)
        # All pairs are there, so they sum too, each with what it has on its other side.
        assert float(result.pair_score.double().sum()) == pytest.approx(expected, abs=1e-4 * size)
        for marginal, numbers in (
            (result.query_marginal, result.query_source),
            (result.key_marginal, result.key_source),
        ):
            assert float(marginal.double().sum()) == pytest.approx(expected, abs=1e-4 * size)
            sums = torch.zeros(len(marginal), dtype=torch.float64).index_add(0, numbers, result.pair_score.double())
            torch.testing.assert_close(sums.float(), marginal, rtol=1e-4, atol=1e-4 * size)
    assert hook_state(model) == before


def test_pairs_equal_those_of_autograd():
    model, prompt = tiny_model("qwen3"), tiny_tokens(1, 9)[0].tolist()
    dictionaries = mixes(model)["relu"]
    result = qk_attribution(model, dictionaries, prompt, 2, 1, 8, 4, top=25)
    run = record(model, {str(at): each for at, each in enumerate(dictionaries)}, [torch.tensor(prompt)])[0]
    maps = linear_query_key(model, run.input_ids, 2, 1, 8, 4)

    def rows(weight, bias, position):
        size = len(weight)
        functionals = ReadVectors(
            torch.full((size,), 2), ["attn.in"] * size, torch.full((size,), position), weight, bias
        )
        return AutogradRows(run).rows(functionals)

    scores = rows(maps.query, maps.query_bias, 8).T @ rows(maps.key, maps.key_bias, 4) * SCALING
    order = scores.abs().flatten().topk(25).indices
    torch.testing.assert_close(result.pair_score, scores.flatten()[order], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(scores[result.query_source, result.key_source], result.pair_score, rtol=1e-3, atol=1e-4)


def test_chunks_of_pairs_do_not_matter(monkeypatch):
    model, prompt = tiny_model("gpt2"), tiny_tokens(1, 8)[0].tolist()
    whole = qk_attribution(model, mixes(model)["relu"], prompt, 1, 0, top=20)
    monkeypatch.setattr("hf_transcoders.circuits.graphs.qk._MAX_ELEMENTS", 500)
    parts = qk_attribution(model, mixes(model)["relu"], prompt, 1, 0, top=20)
    torch.testing.assert_close(whole.pair_score, parts.pair_score)
    assert whole.pairs == [(query, key, pytest.approx(score, rel=1e-4)) for query, key, score in parts.pairs]


def test_a_graph_stands_for_its_prompt_and_texts_name_the_sources():
    model, prompt = tiny_model("gpt2"), tiny_tokens(1, 8)[0].tolist()
    dictionaries = mixes(model)["relu"]
    graph = attribution_graph(model, dictionaries, prompt, max_features=10, skip_first=2, progress=False)
    result = qk_attribution(model, dictionaries, graph, 2, 3, top=40)
    assert result.pairs == qk_attribution(model, dictionaries, prompt, 2, 3, top=40, skip_first=2).pairs
    everything = qk_attribution(model, dictionaries, graph, 2, 3, top=10**6)
    named = set(everything.labels.values())
    assert {"L0 biases", "L2 biases", f'token at "{prompt[3]}" (3)', f'position at "{prompt[7]}" (7)'} <= named
    assert f'L1 error at "{prompt[0]}" (0)' in named and any(name.startswith("L1 feature ") for name in named)
    assert not any(
        name.startswith("L2 ") and "biases" not in name for name, score in everything.strongest("query") if score
    )

    plain = json.loads(json.dumps(result.to_dict()))
    assert plain["other_pairs"] + sum(pair["score"] for pair in plain["pairs"]) == pytest.approx(
        plain["score"], abs=1e-3
    )
    assert len(plain["query"]) == len(plain["key"]) == 40
    table = result.to_text().splitlines()
    assert table[0].startswith("L2H3 from token 7 to token ") and len(table) == 43
    assert result.pairs[0][0] in table[2] and result.pairs[0][1] in table[2]


def test_refused():
    model, prompt = tiny_model("mistral"), tiny_tokens(1, 9)[0].tolist()
    for layer, head in ((3, 0), (0, 4), (-1, 0)):
        with pytest.raises(TranscoderError, match="the layers 0 to 2 with the heads 0 to 3"):
            qk_attribution(model, [], prompt, layer, head)
    with pytest.raises(TranscoderError, match="token 9 was requested"):
        qk_attribution(model, [], prompt, 0, 0, 9)
    with pytest.raises(TranscoderError, match="give at least 1"):
        qk_attribution(model, [], prompt, 0, 0, top=0)
    # Later than the query, and outside the window of 6 tokens.
    for key_position in (8, 0):
        with pytest.raises(TranscoderError, match=f"cannot attend from token 7 to token {key_position}"):
            qk_attribution(model, [], prompt, 0, 0, 7, key_position)
    with pytest.raises(TranscoderError, match="side='value' is unknown"):
        qk_attribution(model, [], prompt, 0, 0).strongest("value")


def test_queries_that_are_not_a_rotated_projection_are_refused():
    model, prompt = tiny_model("llama"), tiny_tokens(1, 9)[0].tolist()
    projection = model.model.layers[1].self_attn.q_proj
    with pytest.raises(TranscoderError, match="this llama model cannot be taken apart"):
        handle = projection.register_forward_hook(lambda module, args, output: output.tanh())
        try:
            qk_attribution(model, [], prompt, 1, 0)
        finally:
            handle.remove()
