"""`module:` sites carry any causal language model, known or not, from training to the report."""

import datasets
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    GenerationMixin,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.modeling_outputs import CausalLMOutput

from hf_transcoders import (
    DriftProbe,
    TranscoderConfig,
    TranscoderError,
    TranscoderEvaluator,
    TranscoderModel,
    TranscoderSet,
    TranscoderTrainer,
    TranscoderTrainingArguments,
    ablate,
    capture,
    explain_features,
    splice,
)
from hf_transcoders.circuits.graphs import attribution_graph
from hf_transcoders.circuits.interventions import FeatureEdit, intervention_losses
from hf_transcoders.circuits.patching import Patching
from hf_transcoders.features import promoted_tokens as features_module
from hf_transcoders.lm.partial_forward import block_of, runs_head_apart
from hf_transcoders.tasks import end_logits
from hf_transcoders.training.memory_plan import plan_run
from tests.circuits.patching.brute_force import tiny_task
from tests.tiny_models import ALL_CONFIGS, tiny_model, tiny_tokens


_SIZES = {
    "vocab_size": 128, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 64,
}  # fmt: skip


class OwnConfig(PretrainedConfig):
    model_type = "own"
    vocab_size, hidden_size, num_hidden_layers = 128, 32, 2


class OwnModel(PreTrainedModel, GenerationMixin):
    """A model unlike any other: no decoder of its own, logits from two places, values changed in place, a tuple."""

    config_class = OwnConfig

    def __init__(self, config):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(128, 32)
        self.mix = nn.ModuleList(nn.Linear(32, 32) for _ in range(2))
        self.out = nn.Linear(32, 128)
        self.skip = nn.Linear(32, 128)
        self.post_init()

    def forward(self, input_ids, use_cache=False):
        first = stream = self.embed_tokens(input_ids)
        for layer in self.mix:
            # In place, and with batch and positions as one axis.
            added = layer(stream.cumsum(1).flatten(0, 1)).relu_()
            added += 0.1
            stream = stream + added.view_as(stream)
        return CausalLMOutput(logits=self.out(stream) + self.skip(first))


def mamba():
    return AutoModelForCausalLM.from_config(AutoConfig.for_model("mamba", **_SIZES, state_size=4))


def lfm2():
    changes = {"num_key_value_heads": 2, "layer_types": ["conv", "full_attention"]}
    return AutoModelForCausalLM.from_config(AutoConfig.for_model("lfm2", **_SIZES, **changes))


def opt_with_norms_on_the_stream():
    config = AutoConfig.for_model("opt", **_SIZES, ffn_dim=48, word_embed_proj_dim=32, do_layer_norm_before=False)
    return AutoModelForCausalLM.from_config(config)


# Model -> where a dictionary reads and writes, and whether its head can be run apart from its decoder.
MODELS = {
    "own": (lambda: OwnModel(OwnConfig()), "mix.1:in", "mix.1:out", False),
    "mamba": (mamba, "backbone.layers.1.mixer:in", "backbone.layers.1.mixer:out", True),
    "lfm2": (lfm2, "model.layers.0.conv:in", "model.layers.0.conv:out", True),
    "opt": (opt_with_norms_on_the_stream, "model.decoder.layers.1.fc1:in", "model.decoder.layers.1.fc2:out", True),
    "mixtral": (lambda: tiny_model("mixtral"), "model.layers.1.mlp.gate:in", "model.layers.1.mlp.experts:out", True),
}  # fmt: skip


@pytest.fixture(params=MODELS)
def case(request):
    make, read, write, apart = MODELS[request.param]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = make().eval()
    config = TranscoderConfig.for_model(model, f"module:{read}", f"module:{write}", num_features=16, k=4)
    return model, TranscoderModel(config).eval(), apart


def word_tokenizer():
    words = Tokenizer(WordLevel({f"w{number}": number for number in range(128)}, unk_token="w0"))
    return PreTrainedTokenizerFast(tokenizer_object=words)


@pytest.fixture
def rows():
    return datasets.Dataset.from_list([{"input_ids": row.tolist()} for row in tiny_tokens(12, 10)])


def test_from_training_to_the_report(case, rows, tmp_path):
    model, dictionary, apart = case
    args = TranscoderTrainingArguments(
        str(tmp_path / "run"), max_tokens=128, per_device_train_batch_size=64, report_to="none", disable_tqdm=True,
        save_strategy="no",
    )  # fmt: skip
    trainer = TranscoderTrainer(dictionary, model, args, train_dataset=rows, eval_dataset=rows)
    trainer.train()
    assert trainer.evaluate()
    trainer.create_model_card()
    assert plan_run(model, [dictionary.config], args, rows=12).flops["language model"] > 0
    TranscoderSet([trainer.model]).save_pretrained(tmp_path / "set")
    dictionary = next(iter(TranscoderSet.from_pretrained(tmp_path / "set").values())).eval()

    report = TranscoderEvaluator(model, rows, progress=False, skip_first=0).evaluate({"t": dictionary}, together=True)
    ids = torch.tensor(rows["input_ids"])
    assert runs_head_apart(model, ids) == apart and block_of(model, dictionary.config.output_site) in (0, 1)

    def cross_entropy():
        with torch.no_grad():
            logits = model(input_ids=ids).logits
        return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).item()

    metrics = report.dictionaries["t"]["metrics"]
    plain = cross_entropy()
    assert metrics["ce_original"] == pytest.approx(plain, rel=1e-5)
    with splice(model, dictionary, error="drop"):
        assert metrics["ce_spliced"] == report.together["ce_spliced"] == pytest.approx(cross_entropy(), rel=1e-5)
    with ablate(model, dictionary.config.output_site):
        assert metrics["ce_zero_ablated"] == pytest.approx(cross_entropy(), rel=1e-5)
    with splice(model, dictionary):
        assert cross_entropy() == pytest.approx(plain, rel=1e-6)
    edits = [FeatureEdit("t", 3, position="all", kind="set", value=50.0)]
    assert intervention_losses(model, rows, {"t": dictionary}, edits, progress=False)["kl"] > 0

    probe = DriftProbe(TranscoderSet([dictionary]), rows)
    probe.take_baseline(model)
    assert probe.measure(model).model["kl"] == pytest.approx(0, abs=1e-6)

    explained = explain_features(model, dictionary, rows, word_tokenizer(), features="active", progress=False)
    assert explained and all(feature.contexts for feature in explained)


@torch.no_grad()
def test_what_was_read_is_not_changed_afterwards():
    model = OwnModel(OwnConfig()).eval()
    ids = tiny_tokens()
    with capture(model, ["module:mix.0:in", "module:mix.0:out"]) as captured:
        model(ids)
    expected = nn.functional.linear(captured["module:mix.0:in"], model.mix[0].weight, model.mix[0].bias)
    torch.testing.assert_close(captured["module:mix.0:out"], expected)
    assert captured["module:mix.0:out"].shape == (2, 12, 32) and (expected < 0).any()


def test_promoted_tokens_are_left_out_with_the_reason(rows, monkeypatch):
    model = mamba().eval()
    config = TranscoderConfig.for_model(model, "module:backbone.layers.1.mixer:in", "module:backbone.layers.1.mixer:out",
                                        num_features=16, k=4)  # fmt: skip
    said = []
    monkeypatch.setattr(features_module.logger, "warning_once", said.append, raising=False)
    explained = explain_features(model, TranscoderModel(config), rows, word_tokenizer(), progress=False)
    assert said == [
        "The direct path of features to the logits is left out: the residual stream of model type 'mamba' is not known to this library."
    ]
    assert all(feature.top_tokens == feature.bottom_tokens == [] for feature in explained)


def test_modules_that_work_on_something_else_than_tokens_are_refused(rows):
    model = tiny_model("llama")
    config = TranscoderConfig.for_model(model, "module:model.rotary_emb:out", num_features=16, k=4, d_in=8, d_out=8)
    with pytest.raises(TranscoderError, match="are not one vector for each token"):
        TranscoderEvaluator(model, rows, progress=False).measure_fidelity({"t": TranscoderModel(config)})


def test_graphs_and_patches_of_unknown_families_are_refused():
    model = mamba().eval()
    for call in (lambda: attribution_graph(model, [], [5, 6, 7]), lambda: Patching(model, tiny_task())):
        with pytest.raises(
            TranscoderError, match=r"layers, heads and residual stream cannot be found.*to train, evaluate"
        ):
            call()


@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom", "mixtral"])
def test_models_without_a_head_are_refused_in_one_sentence(family, rows):
    model, task = AutoModel.from_config(ALL_CONFIGS[family]()).eval(), tiny_task()
    config = TranscoderConfig.for_model(model, "layers.0.mlp.in", "layers.0.mlp.out", num_features=16, k=4)
    dictionary = TranscoderModel(config)
    for call in (
        lambda: TranscoderEvaluator(model, rows, progress=False),
        lambda: DriftProbe([dictionary], rows).take_baseline(model),
        lambda: Patching(model, task),
        lambda: end_logits(model, task),
    ):
        with pytest.raises(
            TranscoderError, match="has no language-model head, so it has no logits: load the model with"
        ):
            call()
    if family != "bloom":  # Its heads cannot be read.
        graph = attribution_graph(model, [dictionary], [5, 6, 7], progress=False)
        assert len(graph.targets) == 4 and sum(target.weight for target in graph.targets) == pytest.approx(1)
        with pytest.raises(TranscoderError, match="has no language-model head"):
            attribution_graph(model, [dictionary], [5, 6, 7], targets=[9], progress=False)
        with pytest.raises(TranscoderError, match="has no language-model head: leave `logit_mass` out"):
            attribution_graph(model, [dictionary], [5, 6, 7], logit_mass=0.5, progress=False)
    # Features need no head: only the tokens that they promote do.
    explained = explain_features(model, dictionary, rows, word_tokenizer(), progress=False)
    assert explained and not explained[0].top_tokens
