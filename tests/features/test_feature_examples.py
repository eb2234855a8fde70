import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    OPTConfig,
    PreTrainedTokenizerFast,
)

from hf_transcoders.errors import TranscoderError
from hf_transcoders.features import explain_features
from hf_transcoders.lm import capture
from hf_transcoders.lm.norms import norm_gain
from hf_transcoders.models import TranscoderConfig, TranscoderModel

from ..evaluation.conftest import VOCABULARY, WIDTH, random_dictionary


TRIGGER, PROMOTED, FEATURE = 17, 23, 5


@pytest.fixture
def tokenizer():
    words = {f"w{i} ": i for i in range(VOCABULARY)}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(words, unk_token="w0 ")))


@pytest.fixture
def planted(base):
    """Feature 5 fires on one token alone and writes towards another; feature 6 fires on everything but it."""
    # At the input of the first block every token has its own direction.
    config = TranscoderConfig.for_model(
        base, input_site="layers.0.resid_pre", output_site="layers.2.mlp.branch", num_features=64, activation="relu"
    )
    dictionary = TranscoderModel(config)
    embeddings = torch.nn.functional.normalize(base.get_input_embeddings().weight.data, dim=-1)
    base.get_input_embeddings().weight.data = embeddings
    with torch.no_grad():
        base.model.norm.weight.copy_(torch.rand(WIDTH) + 0.5)
        # Rows far from each other, so that the planted token is the one that gains most.
        base.lm_head.weight.copy_(torch.nn.functional.normalize(base.lm_head.weight, dim=-1))
        closest = (embeddings @ embeddings[TRIGGER]).topk(2).values[1]
        dictionary.W_enc.zero_()
        # Other features write in all directions, as those of a trained dictionary do.
        dictionary.W_dec.normal_()
        dictionary.W_enc[FEATURE] = embeddings[TRIGGER]
        dictionary.b_enc[FEATURE] = -(1 + closest) / 2
        dictionary.W_enc[FEATURE + 1] = -embeddings[TRIGGER]
        dictionary.b_enc[FEATURE + 1] = (1 + closest) / 2
        dictionary.W_dec[FEATURE] = 4 * base.lm_head.weight[PROMOTED] / base.model.norm.weight
    return dictionary


def test_a_planted_feature_is_found(base, planted, blocks, tokenizer):
    for block in blocks:
        block["input_ids"] = [3 if token == TRIGGER else token for token in block["input_ids"]]
    for row, positions in ((1, [4]), (3, [0, 9]), (4, [0]), (6, [3, 7])):
        for position in positions:
            blocks[row]["input_ids"][position] = TRIGGER
    ids = torch.tensor([row["input_ids"] for row in blocks])
    expected = {row: (ids[row, 1:] == TRIGGER).nonzero().flatten() + 1 for row in range(len(ids))}
    rows = [row for row, positions in expected.items() if len(positions)]

    (found,) = explain_features(
        base, planted, blocks, tokenizer, features=[FEATURE], num_contexts=5, window=3, batch_size=2, progress=False
    )
    assert found.feature == FEATURE
    # Neither the first position of a block nor a second peak in one block gives a context.
    assert sorted(context.row for context in found.contexts) == rows == [1, 3, 6]
    for context in found.contexts:
        assert context.position in expected[context.row]
        start = max(0, context.position - 3)
        window = ids[context.row, start : context.position + 4].tolist()
        assert context.tokens == [f"w{i} " for i in window]
        assert context.tokens[context.peak] == f"w{TRIGGER} "
        fires = [token == TRIGGER and start + i > 0 for i, token in enumerate(window)]
        assert [activation > 0 for activation in context.activations] == fires
    assert found.density == (ids[:, 1:] == TRIGGER).sum().item() / ids[:, 1:].numel()
    assert found.max_activation == pytest.approx(found.mean_activation, rel=1e-5)
    assert found.top_tokens[0][0] == f"w{PROMOTED} "
    weights = planted.W_dec * base.model.norm.weight @ base.lm_head.weight.T
    scores = ((weights - weights.mean(0)) / weights.std(0, correction=0))[FEATURE]
    assert found.top_tokens == [
        (f"w{i} ", pytest.approx(scores[i].item(), abs=1e-4)) for i in scores.topk(10).indices.tolist()
    ]
    assert found.bottom_tokens[0] == (f"w{scores.argmin().item()} ", pytest.approx(scores.min().item(), abs=1e-4))
    text = found.to_text()
    assert f"[[w{TRIGGER} ]]" in text and "direct path promotes (z): " in text and "active on" in text


@pytest.mark.parametrize("num_contexts, batch_size", [(3, 2), (4, 7), (20, 3)])
@torch.no_grad()
def test_streaming_top_activations_equal_a_full_sort(base, blocks, tokenizer, num_contexts, batch_size):
    dictionary = random_dictionary(base, 1, "relu")
    ids = torch.tensor([row["input_ids"] for row in blocks])
    with capture(base, "layers.1.mlp.in") as activations:
        base(ids)
        dense = dictionary.encode(activations["layers.1.mlp.in"])
    dense[:, 0] = 0
    explained = explain_features(
        base,
        dictionary,
        blocks,
        tokenizer,
        features="active",
        num_contexts=num_contexts,
        batch_size=batch_size,
        progress=False,
    )
    fired = dense.count_nonzero((0, 1))
    densities = [e.density for e in explained]
    assert densities == sorted(densities, reverse=True)
    assert sorted(e.feature for e in explained) == fired.nonzero().flatten().tolist()
    for explanation in explained:
        column = dense[..., explanation.feature]
        peaks, positions = column.max(1)
        order = peaks.argsort(descending=True)[:num_contexts]
        order = order[peaks[order] > 0]
        assert [c.row for c in explanation.contexts] == order.tolist()
        assert [c.position for c in explanation.contexts] == positions[order].tolist()
        assert [c.activations[c.peak] for c in explanation.contexts] == pytest.approx(peaks[order].tolist(), rel=1e-4)
        assert explanation.mean_activation == pytest.approx(
            (column.sum() / fired[explanation.feature]).item(), rel=1e-4
        )


def test_a_sample_runs_from_frequent_to_rare(base, blocks, tokenizer):
    dictionary = random_dictionary(base, 1, "topk", k=4)
    everything = explain_features(base, dictionary, blocks, tokenizer, features="active", progress=False)
    sample = explain_features(base, dictionary, blocks, tokenizer, num_features=4, num_contexts=2, progress=False)
    densities = [explanation.density for explanation in sample]
    assert len(sample) == 4 and densities == sorted(densities, reverse=True)
    assert densities[0] == everything[0].density
    assert all(len(explanation.contexts) == 2 for explanation in sample)


SIZES = {"vocab_size": 60, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
FAMILIES = {
    "llama": LlamaConfig(**SIZES, intermediate_size=32),
    "gemma2": Gemma2Config(**SIZES, intermediate_size=32, num_key_value_heads=1, head_dim=8),
    "gpt2": GPT2Config(vocab_size=60, n_embd=16, n_layer=1, n_head=2),
    "gpt_neox": GPTNeoXConfig(**SIZES, intermediate_size=32),
    "opt": OPTConfig(**SIZES, ffn_dim=32, word_embed_proj_dim=16),
}


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_the_probed_norm_is_its_derivative_at_fixed_scale(family):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(FAMILIES[family]).eval()
    path = {"gpt2": "ln_f", "gpt_neox": "final_layer_norm", "opt": "decoder.final_layer_norm"}.get(family, "norm")
    norm = model.base_model.get_submodule(path)
    for parameter in norm.parameters():
        parameter.normal_()
    rows, stream = torch.randn(2, 3, 16).unbind()
    # A change that leaves the scale alone: one that is orthogonal to the stream, and to its mean, and small.
    centred = stream - stream.mean(-1, keepdim=True) if family in ("gpt2", "gpt_neox", "opt") else stream
    rows = rows - (rows * centred).sum(-1, keepdim=True) / centred.square().sum(-1, keepdim=True) * centred
    scale = centred.square().mean(-1, keepdim=True).sqrt()
    rate = (norm(stream + 1e-3 * rows) - norm(stream - 1e-3 * rows)) / 2e-3
    torch.testing.assert_close(rate * scale, norm_gain(norm, 16).push(rows), rtol=1e-2, atol=1e-2)


def test_refusals(base, blocks, tokenizer):
    dictionary = random_dictionary(base, 1, "relu")
    with pytest.raises(TranscoderError, match="features 0 to 39"):
        explain_features(base, dictionary, blocks, tokenizer, features=[40], progress=False)
    dictionary.W_enc.data.zero_()
    with pytest.raises(TranscoderError, match="No feature is active"):
        explain_features(base, dictionary, blocks, tokenizer, progress=False)


def test_several_dictionaries_are_explained_as_each_alone(base, blocks, tokenizer):
    dictionaries = {"a": random_dictionary(base, 0, "relu"), "b": random_dictionary(base, 1, "topk", k=4)}
    together = explain_features(base, dictionaries, blocks, tokenizer, num_features=3, progress=False)
    for name, dictionary in dictionaries.items():
        assert together[name] == explain_features(base, dictionary, blocks, tokenizer, num_features=3, progress=False)
    chosen = explain_features(base, dictionaries, blocks, tokenizer, features={"b": [2, 1]}, progress=False)
    assert {name: [e.feature for e in found] for name, found in chosen.items()} == {"b": [2, 1]}
    for given, features, message in (
        (dictionaries, [1], "as a mapping"),
        (dictionaries, {"c": [1]}, "no dictionary 'c'"),
        (dictionaries["a"], {"a": [1]}, "without its name"),
    ):
        with pytest.raises(TranscoderError, match=message):
            explain_features(base, given, blocks, tokenizer, features=features, progress=False)
