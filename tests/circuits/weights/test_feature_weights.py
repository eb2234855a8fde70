"""Strengths against hooked forward passes and loops in double precision, on every family."""

import pytest
import torch

from hf_transcoders import TranscoderError, edit_attention
from hf_transcoders.circuits import FeatureWeights
from hf_transcoders.circuits.weights import connections
from hf_transcoders.lm import Site, capture, locate
from hf_transcoders.lm.architectures import architecture_of, has_parallel_residual
from hf_transcoders.lm.norms import frozen_norm, norm_scale
from hf_transcoders.lm.stream import norm_after, norm_before, stream_before
from hf_transcoders.models.linear_parts import decoder_rows, encoder_rows
from tests.circuits.weights.setups import dictionary, pair
from tests.tiny_models import HIDDEN_SIZE, NUM_LAYERS, TINY_CONFIGS, VOCAB_SIZE, tiny_model, tiny_tokens


FAMILIES = sorted(TINY_CONFIGS)
HEADS = 4


def _seen(model, sites):
    with torch.no_grad(), capture(model, sites, stop=False) as activations:
        model(input_ids=tiny_tokens())
        return dict(activations)


def _through_frozen(model, site, rows, activations, before):
    """Rows through the norm at a site, `(batch, seq, n, hidden)`, at the scale it has at each token."""
    norm = norm_before(model, site) if before else norm_after(model, site)
    if norm is None:
        return rows.expand(*tiny_tokens().shape, *rows.shape[-2:])
    at = activations[stream_before(model, site) if before else site]
    return frozen_norm(norm, at[:, :, None])(rows)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_direct_strengths_times_scales_are_what_reaches_the_target(family):
    model = tiny_model(family)
    dictionaries = pair(model)
    out, into = Site("mlp.out", 0), Site("mlp.in", 2)
    activations = _seen(model, [out, stream_before(model, into)])
    written = _through_frozen(model, out, decoder_rows(dictionaries["early"]), activations, before=False)
    arrived = _through_frozen(model, into, written, activations, before=True)
    reached = arrived @ encoder_rows(dictionaries["late"])[0].T
    scale = norm_scale(norm_before(model, into), activations[stream_before(model, into)])
    if norm_after(model, out) is not None:
        scale = scale * norm_scale(norm_after(model, out), activations[out])

    weights = FeatureWeights(model, dictionaries)
    strengths = weights.connections("early", "late", target_features=range(7))
    assert strengths.shape == (10, 7)
    torch.testing.assert_close(strengths * scale[..., None], reached, rtol=1e-4, atol=1e-4)
    some = weights.connections("early", "late", source_features=[4, 1], target_features=[6])
    torch.testing.assert_close(some, strengths[[4, 1]][:, [6]])


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_heads_times_their_patterns_are_what_a_hooked_forward_measures(family):
    """The source's direction is put in front of attention at one token; what attention then writes is measured."""
    model = tiny_model(family)
    dictionaries = pair(model)
    out, into, attention_in, attention_out = (
        Site(*at) for at in (("mlp.out", 0), ("mlp.in", 2), ("attn.in", 1), ("attn.out", 1))
    )
    patterns = {}
    with edit_attention(model, pattern=lambda pattern, layer: patterns.__setitem__(layer, pattern.clone())):
        activations = _seen(
            model, [out, attention_out, *(stream_before(model, site) for site in (attention_in, into))]
        )
    source, token, target_token = 3, 2, 5
    direction = decoder_rows(dictionaries["early"])[[source]]
    direction = _through_frozen(model, out, direction, activations, before=False)
    direction = _through_frozen(model, attention_in, direction, activations, before=True)[:, :, 0]

    def add(module, args, kwargs, result=None):
        hidden = args[0] if args else kwargs["hidden_states"]
        hidden = hidden.clone()
        hidden[:, token] += direction[:, token]
        return ((hidden, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": hidden})

    freeze = lambda pattern, layer: patterns[layer]  # noqa: E731
    handle = locate(model, attention_in).module.register_forward_pre_hook(add, with_kwargs=True)
    with edit_attention(model, pattern=freeze):
        changed = _seen(model, [attention_out])[attention_out]
    handle.remove()
    change = (changed - activations[attention_out])[:, :, None]
    change = _through_frozen(model, attention_out, change, activations, before=False)
    reached = _through_frozen(model, into, change, activations, before=True)[:, target_token, 0]
    reached = reached @ encoder_rows(dictionaries["late"])[0].T

    strengths = FeatureWeights(model, dictionaries).connections("early", "late", source_features=[source], through=1)
    assert strengths.shape == (HEADS, 1, 7)
    scale = _scale(model, activations, out, token, after=True) * _scale(model, activations, attention_in, token)
    scale = scale * _scale(model, activations, attention_out, target_token, after=True)
    scale = scale * _scale(model, activations, into, target_token)
    summed = torch.einsum("bh,hst->bt", patterns[1][:, :, target_token, token], strengths) * scale
    assert summed.abs().max() > 1e-3
    torch.testing.assert_close(summed, reached, rtol=1e-3, atol=1e-4)


def _scale(model, activations, site, token, after=False):
    norm = norm_after(model, site) if after else norm_before(model, site)
    if norm is None:
        return torch.ones(2, 1)
    return norm_scale(norm, activations[site if after else stream_before(model, site)][:, token])


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma3_text", "gpt_neox"])
@torch.no_grad()
def test_one_head_is_its_matrices_in_double_precision(family):
    model = tiny_model(family)
    dictionaries = pair(model)
    weights = FeatureWeights(model, dictionaries)
    attention = locate(model, Site("attn.out", 1)).module
    value, output = _value_and_output(family, attention)
    head_dim, heads = output.shape[1] // HEADS, HEADS
    group = heads // (value.shape[0] // head_dim)
    gain_in = _gain(norm_before(model, Site("attn.in", 1)), family)
    gain_out = torch.eye(HIDDEN_SIZE, dtype=torch.float64)
    if (norm := norm_after(model, Site("attn.out", 1))) is not None:
        gain_out = _gain(norm, family)
    reads, writes = weights.reads("late").double(), weights.writes("early").double()
    naive = torch.empty(heads, 10, 7, dtype=torch.float64)
    vectors = torch.empty(heads, 7, HIDDEN_SIZE, dtype=torch.float64)
    for head in range(heads):
        rows = slice(head // group * head_dim, (head // group + 1) * head_dim)
        circuit = gain_out @ output[:, head * head_dim : (head + 1) * head_dim] @ value[rows] @ gain_in
        for j in range(7):
            vectors[head, j] = circuit.T @ reads[j]
            for i in range(10):
                naive[head, i, j] = writes[i] @ circuit.T @ reads[j]
    every = weights.connections("early", "late", target_features=range(7), through=1)
    torch.testing.assert_close(every.double(), naive, rtol=1e-4, atol=1e-4)
    one = weights.connections("early", "late", target_features=[5], through=(1, 2))
    torch.testing.assert_close(one.double(), naive[2][:, [5]], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(weights.pulled("late", through=1).double(), vectors, rtol=1e-4, atol=1e-4)
    norms = weights.ov_norms("late")
    parallel = has_parallel_residual(model)
    assert norms.shape == (7, NUM_LAYERS - parallel, HEADS)
    torch.testing.assert_close(norms[:, 1].double(), vectors.norm(dim=-1).T, rtol=1e-4, atol=1e-4)


def _value_and_output(family, attention):
    """(kv_heads * head_dim, hidden) and (hidden, heads * head_dim), read as each family stores them."""
    if family == "gpt2":
        value, output = attention.c_attn.weight.T[2 * HIDDEN_SIZE :], attention.c_proj.weight.T
    elif family == "gpt_neox":
        fused = attention.query_key_value.weight.view(HEADS, 3, -1, HIDDEN_SIZE)
        value, output = fused[:, 2].reshape(-1, HIDDEN_SIZE), attention.dense.weight
    else:
        value, output = attention.v_proj.weight, attention.o_proj.weight
    return value.double(), output.double()


def _gain(norm, family):
    weight = norm.weight.double() + family.startswith("gemma")
    centring = torch.eye(HIDDEN_SIZE, dtype=torch.float64)
    if family in ("gpt2", "gpt_neox"):
        centring = centring - 1 / HIDDEN_SIZE
    return weight.diag() @ centring


@pytest.mark.parametrize("through", [None, 1, (1, 3)])
@pytest.mark.parametrize("elements, k", [(30, 5), (100, 100), (2**23, 7), (30, 10**6)])
@torch.no_grad()
def test_the_strongest_in_parts_are_the_strongest_of_all(monkeypatch, through, elements, k):
    model = tiny_model("gemma2")
    dictionaries = {"early": dictionary(model, 0, 1, num_features=31), "late": dictionary(model, 2, 2, num_features=7)}
    weights = FeatureWeights(model, dictionaries)
    dense = weights.connections("early", "late", target_features=range(7), through=through)
    expected = dense.flatten()[dense.abs().flatten().argsort(descending=True)][:k]
    monkeypatch.setattr(connections, "MAX_ELEMENTS", elements)
    top = weights.top_connections("early", "late", k, through=through)
    torch.testing.assert_close(torch.tensor(top.strengths), expected)
    heads = top.heads if isinstance(through, int) else [None] * len(top.strengths)
    for head, source, target, strength in zip(
        heads, top.source_features, top.target_features, top.strengths, strict=True
    ):
        found = dense[source, target] if head is None else dense[head, source, target]
        assert found.item() == pytest.approx(strength, rel=1e-4, abs=1e-5)
    assert top.layer == (None if through is None else 1) and (through is None) == (top.heads is None)
    assert top.to_dict()["strengths"] == top.strengths


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_deembeddings_read_what_enters_the_stream(family):
    model = tiny_model(family)
    weights = FeatureWeights(model, pair(model))
    with capture(model, "layers.0.resid_pre") as activations:
        model(input_ids=torch.arange(VOCAB_SIZE)[:, None])
        entering = activations["layers.0.resid_pre"][:, 0]
    if (path := architecture_of(model).position_embeddings) is not None:
        # OPT counts positions from 2.
        entering = entering - model.base_model.get_submodule(path).weight[2 if family == "opt" else 0]
    for through in (None, (1, 2)):
        scores = weights.pulled("late", [4, 0], through).double() @ entering.double().T
        found = weights.deembedding("late", [4, 0], k=6, through=through)
        torch.testing.assert_close(found.top_values.double(), scores.topk(6).values, rtol=1e-4, atol=1e-4)
        assert torch.equal(found.top_ids, scores.topk(6).indices)
        assert torch.equal(found.bottom_ids, scores.topk(6, largest=False).indices)
    assert weights.deembedding("late", [1], k=500, through=0).top_ids.shape == (HEADS, 1, VOCAB_SIZE)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_logits_are_what_the_model_makes_of_a_direction(family):
    model = tiny_model(family)
    weights = FeatureWeights(model, pair(model))
    head, norm = model.get_output_embeddings(), model.base_model.get_submodule(architecture_of(model).final_norm)
    stream = torch.randn(1, HIDDEN_SIZE)
    through = frozen_norm(norm, stream)(weights.writes("late", [2, 5])) / norm_scale(norm, stream)
    logits = head(through) - head(torch.zeros(1, HIDDEN_SIZE))
    found = weights.logits("late", [2, 5], k=4)
    torch.testing.assert_close(found.top_values, logits.topk(4).values, rtol=1e-4, atol=1e-4)
    assert torch.equal(found.bottom_ids, logits.topk(4, largest=False).indices)


@pytest.mark.parametrize("family", ["gpt2", "gemma3_text"])
@torch.no_grad()
def test_pull_backs(family):
    model = tiny_model(family)
    dictionaries = pair(model)
    weights = FeatureWeights(model, dictionaries)
    vectors = weights.pulled("late", [3, 6], through=1)
    pulled = weights.pull_back("early", vectors)
    torch.testing.assert_close(
        pulled, weights.connections("early", "late", target_features=[3, 6], through=1).mT, rtol=1e-4, atol=1e-4
    )
    # On a prompt: activation times what the direction becomes after the post-norm, token by token.
    ids, out, read = tiny_tokens()[0], Site("mlp.out", 0), Site("mlp.in", 0)
    activations = _seen(model, [out, read])
    features = dictionaries["early"].encode(activations[read][0])
    written = _through_frozen(model, out, decoder_rows(dictionaries["early"]), activations, before=False)[0]
    on_prompt = weights.pull_back("early", vectors[0, 0], ids)
    expected = torch.einsum("tf,tfo,o->tf", features, written, vectors[0, 0])
    assert expected.abs().max() > 1e-3
    torch.testing.assert_close(on_prompt, expected, rtol=1e-3, atol=1e-4)
    assert weights.pull_back("early", vectors, ids).shape == (HEADS, 2, len(ids), 10)


def test_features_of_the_stream_itself():
    model = tiny_model("llama")
    dictionaries = {
        "sae": dictionary(model, 0, 1, read="resid_post", write="resid_post"),
        "late": dictionary(model, 1, 2, read="attn.in", write="attn.branch"),
    }
    weights = FeatureWeights(model, dictionaries)
    strengths = weights.connections("sae", "late", target_features=range(10))
    gain = norm_before(model, Site("attn.in", 1)).weight
    expected = (decoder_rows(dictionaries["sae"]) * gain) @ encoder_rows(dictionaries["late"])[0].T
    torch.testing.assert_close(strengths, expected.detach(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "call, sentence",
    [
        (lambda w: w.connections("late", "early", source_features=[0]), "Nothing goes from 'late' to 'early'"),
        (lambda w: w.connections("early", "early", source_features=[0]), "Nothing goes from 'early' to 'early'"),
        (lambda w: w.connections("early", "late"), "give `source_features` or `target_features`"),
        (lambda w: w.connections("early", "late", source_features=[10]), "has no feature 10: its features are 0 to 9"),
        (lambda w: w.connections("early", "late", target_features=[-1]), "has no feature -1"),
        (lambda w: w.connections("early", "late", source_features=[0], through=0), "not between 'early' and 'late'"),
        (
            lambda w: w.connections("early", "late", source_features=[0], through=(1, 4)),
            "no heads at `through=.1, 4.`",
        ),
        (lambda w: w.connections("early", "late", source_features=[0], through=3), "no heads at `through=3`"),
        (lambda w: w.top_connections("early", "lade"), "no dictionary 'lade': choose from early, late, branch"),
        (lambda w: w.top_connections("early", "late", 0), "k is 0"),
        (lambda w: w.deembedding("early", [0], through=1), "Layer 1 attends after 'early' reads"),
        (lambda w: w.reads("branch"), "'layers.1.mlp.out' does not read the residual stream"),
        (lambda w: w.pull_back("early", torch.zeros(5)), "The vectors are 5 wide and the residual stream 32"),
        (lambda w: w.mean_contributions("early", [0], [{"input_ids": [1, 2, 3]}]), "No dictionary of this set writes"),
    ],
)
def test_mistakes_are_one_sentence(call, sentence):
    model = tiny_model("llama")
    dictionaries = pair(model) | {"branch": dictionary(model, 1, 3, read="mlp.out")}
    with pytest.raises(TranscoderError, match=sentence) as error:
        call(FeatureWeights(model, dictionaries))
    assert "\n" not in str(error.value)


def test_a_set_for_another_model_is_refused():
    model = tiny_model("llama")
    narrow = dictionary(model, 0, 1)
    narrow.config.d_in = 24
    with pytest.raises(TranscoderError, match="has width 24 at 'layers.0.mlp.in', but this model has 32"):
        FeatureWeights(model, [narrow])
    deep = dictionary(model, 2, 1)
    deep.config.input_site = "layers.7.mlp.in"
    with pytest.raises(TranscoderError, match="this model has the layers 0 to 2"):
        FeatureWeights(model, [deep])
