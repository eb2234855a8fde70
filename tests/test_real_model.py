"""The library on SmolLM2-135M-Instruct, which comes as a package. A few minutes of the suite."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_transcoders import (
    TranscoderConfig,
    TranscoderEvaluator,
    TranscoderModel,
    TranscoderSet,
    TranscoderTrainer,
    TranscoderTrainingArguments,
    ablate,
    capture,
    explain_features,
    load_texts,
    offline_model,
    pack_tokens,
    replace,
    splice,
)


pytestmark = pytest.mark.real_model

READ, WRITE = "layers.8.mlp.in", "layers.8.mlp.branch"


@pytest.fixture(scope="module", autouse=True)
def all_threads(request):
    """Matrices are large here; the other tests are faster on one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.config.stash.get("threads", before))
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def path():
    return offline_model("smollm2-135m-instruct")


@pytest.fixture(scope="module")
def base(path):
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer(path):
    return AutoTokenizer.from_pretrained(path)


@pytest.fixture(scope="module")
def rows(tokenizer):
    texts = load_texts("docstrings", limit=400).train_test_split(test_size=60, seed=0)
    return {part: pack_tokens(texts[part], tokenizer, 128) for part in ("train", "test")}


@pytest.fixture(scope="module")
def trained(base, rows, tokenizer, tmp_path_factory):
    torch.manual_seed(0)
    output = tmp_path_factory.mktemp("smollm2")
    shared = {"num_features": 1152, "k": 32}
    trainer = TranscoderTrainer(
        TranscoderSet(
            {
                "transcoder": TranscoderModel(TranscoderConfig.for_model(base, READ, WRITE, **shared)),
                "sae": TranscoderModel(TranscoderConfig.for_model(base, WRITE, **shared)),
            }
        ),
        base,
        TranscoderTrainingArguments(
            str(output), max_tokens=150_000, per_device_train_batch_size=1024, learning_rate=3e-3, use_cpu=True,
            save_strategy="no", report_to="none", disable_tqdm=True,
        ),
        rows["train"],
        processing_class=tokenizer,
    )  # fmt: skip
    trainer.train()
    trainer.save_model()
    return TranscoderSet.from_pretrained(output).eval()


@pytest.fixture(scope="module")
def prompt(tokenizer):
    return tokenizer("When Mary and John went to the store, John gave a drink to", return_tensors="pt")


def test_the_model_knows_what_it_should(base, tokenizer, prompt):
    with torch.no_grad():
        best = base(**prompt).logits[0, -1].argmax()
    assert tokenizer.decode(best) == " Mary"


def test_capture_reads_what_hooks_read(base, prompt):
    seen = {}
    handle = base.model.layers[8].mlp.register_forward_hook(lambda m, a, o: seen.update(i=a[0], o=o))
    with torch.no_grad(), capture(base, [READ, WRITE]) as activations:
        base(**prompt)
    handle.remove()
    assert torch.equal(activations[READ], seen["i"]) and torch.equal(activations[WRITE], seen["o"])


def test_idle_and_removed_hooks_leave_logits_alone(base, prompt):
    with torch.no_grad():
        plain = base(**prompt).logits
        with capture(base, [READ]):
            base(**prompt)
        with ablate(base, [WRITE]):
            ablated = base(**prompt).logits
        again = base(**prompt).logits
    assert torch.equal(plain, again)
    assert not torch.equal(plain, ablated)


@torch.no_grad()
def test_splicing_with_the_error_reproduces_the_logits(base, trained, prompt):
    plain = base(**prompt).logits
    with splice(base, trained["transcoder"], error="keep") as features:
        spliced = base(**prompt).logits
    assert torch.allclose(plain, spliced, atol=1e-4)
    (active,) = features.values()
    assert ((active > 0).sum(-1) <= 32).all() and (active > 0).any()
    with replace(base, {WRITE: trained["transcoder"]}):
        assert not torch.allclose(plain, base(**prompt).logits, atol=1e-2)


@torch.no_grad()
def test_whole_model_of_dictionaries_with_their_errors_reproduces_the_logits(base, prompt):
    torch.manual_seed(0)
    models = [
        TranscoderModel(
            TranscoderConfig.for_model(
                base, f"layers.{i}.mlp.in", f"layers.{i}.mlp.branch", num_features=64, k=4, decoder_init="random"
            )
        )
        for i in range(30)
    ]
    plain = base(**prompt).logits
    with splice(base, models, error="keep"):
        assert torch.allclose(plain, base(**prompt).logits, atol=1e-4)


def test_a_short_training_learns_and_evaluates(base, trained, rows):
    report = TranscoderEvaluator(base, rows["test"], max_tokens=5_000, max_loss_tokens=4_000, progress=False).evaluate(
        trained
    )
    columns = report.columns()
    # A dictionary that knew nothing would have an FVU of one and recover nothing.
    assert columns["transcoder"]["fvu"] < 0.75
    assert columns["sae"]["fvu"] < 0.5
    assert columns["transcoder"]["l0"] <= 32
    for metrics in columns.values():
        assert metrics["ce_original"] < metrics["ce_spliced"] < metrics["ce_mean_ablated"]
        assert 0.5 < metrics["ce_recovered_mean"] < 1


def test_features_are_explained(base, trained, rows, tokenizer):
    (explanation, *_) = explanations = explain_features(
        base, trained["transcoder"], rows["test"], tokenizer, num_features=3, max_tokens=4_000, progress=False
    )
    assert len(explanations) == 3
    peaks = [context.activations[context.peak] for context in explanation.contexts]
    assert peaks == sorted(peaks, reverse=True) and peaks[0] == pytest.approx(explanation.max_activation, rel=1e-4)
    assert len(explanation.top_tokens) == 10


@pytest.fixture(scope="module")
def every_layer(base):
    """Random transcoders for all layers: what must be exact is so for any."""
    torch.manual_seed(0)
    dictionaries = {}
    for layer in range(base.config.num_hidden_layers):
        sites = f"layers.{layer}.mlp.in", f"layers.{layer}.mlp.branch"
        config = TranscoderConfig.for_model(base, *sites, num_features=512, k=8, decoder_init="random")
        dictionaries[f"layers.{layer}"] = TranscoderModel(config).eval()
    return TranscoderSet(dictionaries)


def test_attribution_graphs_are_exact_on_every_layer(base, tokenizer, every_layer):
    from hf_transcoders.circuits import attribution_graph, validate_edges
    from hf_transcoders.circuits.graphs import head_loadings

    prompt = "When Mary and John went to the store, John gave a drink to"
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    with torch.no_grad():
        logits = base(ids).logits
        with splice(base, every_layer, error="keep", features=False):
            torch.testing.assert_close(base(ids).logits, logits, rtol=1e-4, atol=1e-4)

    settings = {"tokenizer": tokenizer, "targets": [(" Mary", " John"), " Mary"], "edges_per_node": 10**6}
    graph = attribution_graph(base, every_layer, prompt, max_features=16, progress=False, **settings)
    difference = logits[0, -1, tokenizer.encode(" Mary")] - logits[0, -1, tokenizer.encode(" John")]
    assert float(graph.total[-2]) == pytest.approx(float(difference), abs=1e-3)
    assert graph.row_residuals()[graph.expanded].max() < 1e-4
    assert graph.metadata["largest_row_excess"] < 1

    reference = attribution_graph(
        base, every_layer, prompt, max_features=16, method="autograd", progress=False, **settings
    )
    dense = [
        torch.zeros(g.num_nodes, g.num_nodes).index_put_((g.target, g.source), g.weight) for g in (graph, reference)
    ]
    largest = dense[0].abs().amax(1, keepdim=True).clamp(min=1e-6)
    assert ((dense[0] - dense[1]).abs() / largest).max() < 3e-5

    loadings = head_loadings(base, every_layer, graph, max_edges=16)
    torch.testing.assert_close(
        loadings.loadings.sum((1, 2)) + loadings.direct, loadings.weight, rtol=1e-4, atol=1e-5 * float(largest.max())
    )
    strong = graph.is_kind("feature")[graph.source].nonzero()[:, 0]
    strong = strong[graph.weight[strong].abs().topk(12).indices]
    pairs = list(zip(graph.source[strong].tolist(), graph.target[strong].tolist(), strict=True))
    summary = validate_edges(base, every_layer, graph, pairs, modes=["direct"]).summary()["direct"]
    assert summary["relative_error"] < 1e-3 and summary["sign_agreement"] == 1
