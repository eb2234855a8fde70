"""Whole graphs: limits on edges and features, targets, several prompts, and refused arguments."""

import pytest
import torch

from hf_transcoders import Site, TranscoderError
from hf_transcoders.circuits.graphs import Target, attribution_graph
from hf_transcoders.models.linear_parts import encoder_rows
from tests.circuits.graphs.setups import mixes
from tests.circuits.interventions.setups import random_dictionary
from tests.tiny_models import HIDDEN_SIZE, VOCAB_SIZE, tiny_model, tiny_tokens


PROMPT = tiny_tokens(1, 8)[0].tolist()


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama")


def graph_of(model, prompt=PROMPT, mix="relu", **changes):
    return attribution_graph(model, mixes(model)[mix], prompt, progress=False, **changes)


def residual(graph):
    return float(graph.row_residuals()[graph.expanded].max())


def rows_of(graph, number):
    return {graph.label(source): weight for source, weight in graph.incoming(number)}


def test_fewer_features_and_edges_still_sum(model):
    whole = graph_of(model)
    assert whole.num_nodes == whole.metadata["active_features"] + (~whole.is_kind("feature")).sum()
    assert (whole.rest == 0).all() and residual(whole) < 1e-5
    fewer = graph_of(model, max_features=20)
    assert fewer.is_kind("feature").sum() == 20 and residual(fewer) < 1e-5
    thin = graph_of(model, max_features=20, edges_per_node=15)
    assert torch.bincount(thin.target).max() == 15 and residual(thin) < 1e-5
    assert thin.rest_abs[-1] > thin.rest_error[-1] > 0
    assert (thin.rest_abs >= thin.rest_error - 1e-5).all() and (thin.rest_abs >= thin.rest.abs() - 1e-5).all()
    # The edges and features are those of the whole graph; all others are in `rest`.
    by_label = rows_of(whole, whole.num_nodes - 1)
    kept = rows_of(thin, thin.num_nodes - 1)
    assert kept == pytest.approx({label: by_label[label] for label in kept}, rel=1e-4, abs=1e-5)
    rest = sum(by_label.values()) - sum(kept.values())
    assert float(thin.rest[-1]) == pytest.approx(rest, abs=1e-3)
    magnitude = sum(map(abs, by_label.values())) - sum(map(abs, kept.values()))
    assert float(thin.rest_abs[-1]) == pytest.approx(magnitude, rel=1e-3)
    # Among all features, those with most influence come first.
    number = {whole.label(node): node for node in range(whole.num_nodes)}
    influence = whole.influence()
    chosen = sum(
        float(influence[number[fewer.label(node)]]) for node in fewer.is_kind("feature").nonzero()[:, 0].tolist()
    )
    assert chosen > 0.8 * float(influence[whole.is_kind("feature")].topk(20).values.sum())


def test_several_prompts_at_once_are_each_alone(model):
    prompts = [PROMPT, PROMPT[:5], tiny_tokens(1, 7, seed=3)[0].tolist()]
    together = attribution_graph(model, mixes(model)["skips"], prompts, max_features=30, progress=False)
    for graph, prompt in zip(together, prompts, strict=True):
        alone = graph_of(model, prompt, "skips", max_features=30)
        assert graph.input_ids == prompt and graph.num_nodes == alone.num_nodes
        for name in ("kind", "layer", "position", "index", "source", "target"):
            assert torch.equal(getattr(graph, name), getattr(alone, name)), name
        torch.testing.assert_close(graph.weight, alone.weight, rtol=1e-4, atol=1e-4)
        assert graph.targets[0].label == alone.targets[0].label


@torch.no_grad()
def test_targets_of_every_kind(model):
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(3, HIDDEN_SIZE, generator=generator)
    dictionary = mixes(model)["relu"][1]
    output = model(torch.tensor([PROMPT]), output_hidden_states=True)
    logits, final = output.logits[0], output.hidden_states[-1][0]
    pre = mlp_input(model, 1)[2]
    row, bias = encoder_rows(dictionary, torch.tensor([3]))
    targets = {
        7: logits[-1, 7] - logits[-1].mean(),
        (7, 9): logits[-1, 7] - logits[-1, 9],
        Target.logit(7, position=2): logits[2, 7] - logits[2].mean(),
        Target.difference(7, 9, position=-3): logits[-3, 7] - logits[-3, 9],
        Target.pre_activation("layers.1.mlp.transcoder", 3, position=2): pre @ row[0] + bias[0],
        Target.direction(vectors[0], "layers.1.resid_pre", position=4): output.hidden_states[1][0, 4] @ vectors[0],
        Target.direction(vectors[1], "layers.1.mlp.in", position=2): pre @ vectors[1],
        vectors[2]: final[-1] @ vectors[2],
    }
    graph = graph_of(model, targets=list(targets))
    nodes = graph.is_kind("target").nonzero()[:, 0]
    assert graph.index[nodes].tolist() == list(range(len(targets)))
    torch.testing.assert_close(graph.total[nodes], torch.stack(list(targets.values())), rtol=1e-4, atol=1e-4)
    assert residual(graph) < 1e-5
    assert [target.label for target in graph.targets] == [
        "7", "7 - 9", "7", "7 - 9", "layers.1.mlp.transcoder feature 3", "direction at layers.1.resid_pre",
        "direction at layers.1.mlp.in", "direction at the final norm",
    ]  # fmt: skip
    assert [target.position for target in graph.targets] == [7, 7, 2, 5, 2, 4, 2, 7]
    assert graph.targets[0].probability == pytest.approx(float(logits[-1].softmax(-1)[7]), rel=1e-4)
    assert graph.targets[0].token_id == 7 and graph.targets[1].token_id is None


def mlp_input(model, layer):
    seen = []
    handle = model.model.layers[layer].mlp.register_forward_pre_hook(lambda module, args: seen.append(args[0][0]))
    model(torch.tensor([PROMPT]))
    handle.remove()
    return seen[0]


@torch.no_grad()
def test_by_default_the_likely_tokens(model):
    probabilities = model(torch.tensor([PROMPT])).logits[0, -1].softmax(-1)
    top = probabilities.sort(descending=True)
    graph = graph_of(model, max_features=5, max_logits=4, logit_mass=1.0)
    assert [target.token_id for target in graph.targets] == top.indices[:4].tolist()
    assert [target.weight for target in graph.targets] == pytest.approx(top.values[:4].tolist(), rel=1e-4)
    mass = float(top.values[:3].sum()) - 1e-4
    graph = graph_of(model, max_features=5, max_logits=50, logit_mass=mass)
    assert len(graph.targets) == 3


class Words:
    """A minimal tokenizer for targets and labels: `w5` is token 5."""

    def __call__(self, text):
        return type("Encoded", (), {"input_ids": [int(word[1:]) for word in text.split()]})

    def encode(self, text, add_special_tokens):
        return self(text).input_ids

    def batch_decode(self, rows, clean_up_tokenization_spaces):
        return [f" w{row[0]}" for row in rows]

    def convert_ids_to_tokens(self, ids):
        return [f"w{token}" for token in ids]


def test_texts(model):
    graph = graph_of(model, "w5 w6 w9", targets=["w7", ("w7", "w8")], tokenizer=Words(), max_features=3)
    assert graph.tokens == [" w5", " w6", " w9"] and graph.input_ids == [5, 6, 9]
    assert [target.label for target in graph.targets] == [" w7", " w7 - w8"]
    with pytest.raises(TranscoderError, match="'w7 w8' is not one token of this model but 2"):
        graph_of(model, "w5 w6", targets=["w7 w8"], tokenizer=Words())
    with pytest.raises(TranscoderError, match="Give the tokenizer too, or token ids instead of text"):
        graph_of(model, "w5 w6")
    with pytest.raises(TranscoderError, match="Give the tokenizer too, or token ids instead of texts such as 'w7'"):
        graph_of(model, targets=["w7"])


def test_dictionaries_that_read_after_an_mlp_end_the_graph(model):
    """The input of an SAE of an MLP's output is not linear in the stream, so its features have no rows."""
    graph = graph_of(model, mix="over several layers", max_features=1000)
    ends = graph.is_kind("feature") & ~graph.expanded
    names = {graph.dictionaries[number] for number in graph.dictionary[ends].tolist()}
    assert len(names) == 1 and "mlp" in names.pop() and residual(graph) < 1e-5
    assert (graph.is_kind("feature") & graph.expanded).any()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_features": 0}, "`max_features` is 0; give at least 1"),
        ({"edges_per_node": 0}, "`edges_per_node` is 0; give at least 1"),
        ({"max_logits": 0}, "`max_logits` is 0; give at least 1"),
        ({"logit_mass": 1.5}, "`logit_mass` is 1.5; give a probability between 0 and 1"),
        ({"targets": 5, "max_logits": 3}, "leave them out where `targets` are given"),
        ({"targets": 5, "logit_mass": 0.5}, "leave them out where `targets` are given"),
        ({"method": "magic"}, "method='magic' is unknown; use 'adjoint' or 'autograd'"),
        ({"prompt": []}, "at least one token"),
        ({"prompt": [[[1, 2]]]}, "at least one token"),
        ({"prompt": [5] * 65}, "has 65 tokens and the model's context 64: shorten it"),
        ({"prompt": [5, VOCAB_SIZE]}, f"has token {VOCAB_SIZE}, which the model does not know"),
        ({"prompt": [5, -1]}, "has token -1, which the model does not know"),
        ({"targets": []}, "give at least one target"),
        ({"targets": [1.5]}, "1.5 is not a target: give a token"),
        ({"targets": [(1, 2, 3)]}, r"\(1, 2, 3\) is not a target"),
        ({"targets": VOCAB_SIZE}, f"Token {VOCAB_SIZE} does not exist: the model has the tokens 0 to {VOCAB_SIZE - 1}"),
        ({"targets": Target.logit(3, position=8)}, "the tokens 0 to 7, but token 8 was requested"),
        ({"targets": Target.pre_activation("x", 3)}, "There is no dictionary 'x': choose from"),
        ({"targets": Target.pre_activation("layers.1.mlp.transcoder", 999)}, "Feature 999 does not exist: .* the features 0 to"),
        ({"targets": Target.direction(torch.ones(3))}, r"has the shape \(3,\), but the activation there is 32 wide"),
        ({"targets": Target.direction(torch.ones(32), "layers.0.mlp.out")}, "cannot be read at 'layers.0.mlp.out'"),
        ({"targets": Target.direction(torch.ones(32), "layers.3.mlp.in")}, "of the layers 0 to 2"),
    ],
)  # fmt: skip
def test_refused(model, changes, message):
    with pytest.raises(TranscoderError, match=message):
        graph_of(model, **{"prompt": PROMPT, **changes})


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({}, "give one of the three"),
        ({"tokens": (5,), "vector": torch.ones(32)}, "give one of the three"),
        ({"tokens": (5,), "site": "layers.0.mlp.in"}, "give one of the three"),
        ({"dictionary": "x"}, "give one of the three"),
        ({"feature": 3}, "give one of the three"),
        ({"tokens": (5, 6, 7)}, "one or two tokens, not 3"),
    ],
)
def test_a_target_is_one_thing(parts, message):
    with pytest.raises(TranscoderError, match=message):
        Target(**parts)


def test_limits_of_targets_are_saved_only_where_they_count(model):
    assert (
        graph_of(model, max_features=5).metadata["settings"].items() >= {"max_logits": 10, "logit_mass": 0.95}.items()
    )
    assert not {"max_logits", "logit_mass"} & graph_of(model, max_features=5, targets=5).metadata["settings"].keys()


def test_one_prompt_gives_a_graph_and_several_a_list(model):
    ids = torch.tensor(PROMPT)
    for one in (PROMPT, ids, {"input_ids": PROMPT}, {"input_ids": ids[None]}):
        assert graph_of(model, one, max_features=5).input_ids == PROMPT
    for several in ([PROMPT], [ids], ids[None], [{"input_ids": PROMPT}]):
        (graph,) = graph_of(model, several, max_features=5)
        assert graph.input_ids == PROMPT
    graphs = graph_of(model, {"input_ids": [PROMPT, PROMPT[:4]]}, max_features=5)
    assert [graph.input_ids for graph in graphs] == [PROMPT, PROMPT[:4]]
    assert len(graph_of(model, ["w5 w6", "w7"], tokenizer=Words(), max_features=5)) == 2


def test_a_place_that_a_parallel_model_does_not_have_is_refused():
    model = tiny_model("gpt_neox")
    target = Target.direction(torch.ones(HIDDEN_SIZE), "layers.1.resid_mid")
    with pytest.raises(TranscoderError, match="'layers.1.resid_mid' does not exist in this model"):
        graph_of(model, targets=target)


def test_features_that_read_after_an_mlp_are_not_targets(model):
    sae = random_dictionary(model, "layers.1.mlp.out", "layers.1.mlp.out")
    with pytest.raises(TranscoderError, match="after an MLP: they end a graph"):
        attribution_graph(model, {"sae": sae}, PROMPT, targets=Target.pre_activation("sae", 1), progress=False)


def changed(dictionary, **changes):
    for name, value in changes.items():
        setattr(dictionary.config, name, value)
    return dictionary


def test_dictionaries_that_do_not_fit_are_refused(model):
    def refused(dictionaries, message):
        if not isinstance(dictionaries, dict):
            dictionaries = {"one": dictionaries}
        with pytest.raises(TranscoderError, match=message):
            attribution_graph(model, dictionaries, PROMPT, progress=False)

    def one(source="layers.1.mlp.in", target="layers.1.mlp.out", **changes):
        return random_dictionary(model, source, target, **changes)

    refused(changed(one(), output_site=None), "does not say where it belongs: set")
    refused(changed(one(), input_site=None), "does not say where it belongs: set")
    refused(one(target="layers.1.mlp.in"), "'one' writes to 'layers.1.mlp.in', which is not part of a linear model")
    refused(changed(one(), input_site="layers.2.mlp.in"), "before it reads 'layers.2.mlp.in': it cannot be spliced in")
    refused(changed(one(), input_site="module:model.layers.1.mlp:in"), "it cannot be spliced in")
    refused(changed(one(), d_in=16), "has width 16 at .layers.1.mlp.in., but this model has 32")
    refused(one("layers.0.mlp.out", skip_connection=True), "reads 'layers.0.mlp.out', after an MLP: it is not linear")
    refused({"a": one(), "b": one(target="layers.1.mlp.branch")}, "'a' and 'b' write to one place: keep one")
    same = {
        "a": one("layers.0.resid_post", "layers.0.resid_post"),
        "b": one("layers.1.resid_pre", "layers.1.resid_pre"),
    }
    refused(same, "'a' and 'b' write to one place: keep one")
    refused(changed(one(), base_model_type="gpt2"), "for a model of type 'gpt2', and this is one of type 'llama'")
    refused(changed(one(), input_site="layers.1.mlp.in", output_site="layers.5.mlp.out"), "has the layers 0 to 2")
    mine, theirs = "one/model", "other/model"
    earlier, model.config.name_or_path = model.config.name_or_path, mine
    try:
        refused(
            changed(one(), base_model_name_or_path=theirs), "for other/model, and this is one/model: load the model"
        )
        model.config._commit_hash = "new"
        refused(
            changed(one(), base_model_name_or_path=mine, base_model_revision="old"),
            'load the model with `revision="old"`',
        )
    finally:
        model.config.name_or_path = earlier
        model.config._commit_hash = None


def test_a_graph_says_where_it_comes_from(model):
    graph = graph_of(model, max_features=5, skip_first=2)
    assert graph.metadata["settings"]["skip_first"] == 2 and graph.metadata["settings"]["max_features"] == 5
    assert [entry["input_site"] for entry in graph.metadata["dictionaries"]] == [
        f"layers.{at}.mlp.in" for at in range(3)
    ]
    assert graph.metadata["largest_row_error"] == residual(graph) < 1e-5
    # There are no features where dictionaries are not used.
    assert graph.position[graph.is_kind("feature")].min() >= 2
    assert Site.parse(graph.metadata["dictionaries"][0]["output_site"]).point == "mlp.branch"


def test_a_model_in_training_is_explained_without_dropout():
    model = tiny_model("gpt2")
    expected = graph_of(model)
    model.train()
    found = graph_of(model)
    assert model.training and torch.equal(found.weight, expected.weight) and found.warning is None
