import json
import re

import datasets
import pytest
import torch
import torch.nn.functional as F
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaModel,
    OPTConfig,
)

from hf_transcoders.data.token_blocks import TokenBlocks
from hf_transcoders.errors import TranscoderError
from hf_transcoders.evaluation import EvaluationReport, TranscoderEvaluator, ce_recovered
from hf_transcoders.evaluation.evaluation_report import METRICS, REPLACEMENT_METRICS, format_number
from hf_transcoders.lm.partial_forward import final_hidden_states, logits_of, record_block_outputs, restart_at
from hf_transcoders.models import TranscoderSet
from hf_transcoders.text.markdown import escape

from .conftest import LAYERS, WIDTH, perfect_autoencoder, random_dictionary


LOSS_METRICS = (
    "ce_original",
    *(f"{metric}{ending}" for metric in ("kl", "top1_agreement") for ending in ("", "_zero_ablated", "_mean_ablated")),
    *("ce_spliced", "ce_zero_ablated", "ce_mean_ablated"),
)


def evaluator(base, blocks, **kwargs):
    return TranscoderEvaluator(base, blocks, **{"batch_size": 3, "progress": False, **kwargs})


def counted_positions(blocks, skip_first, special=()):
    ids = torch.tensor([row["input_ids"] for row in blocks])
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[:, :skip_first] = False
    for token in special:
        mask &= ids != token
    return ids, mask


def mlp_activations(base, ids, layer):
    """Input and output of one MLP, by plain hooks."""
    seen = {}

    def hook(module, args, output):
        seen["in"], seen["out"] = args[0], output

    handle = base.model.layers[layer].mlp.register_forward_hook(hook)
    logits = base(ids).logits
    handle.remove()
    return seen["in"], seen["out"], logits


def logits_with(base, ids, mask, changes):
    """Logits with MLP outputs rewritten by `changes` (layer -> function of the MLP's input), by plain hooks."""
    handles = [
        base.model.layers[layer].mlp.register_forward_hook(
            lambda module, args, output, change=change: torch.where(mask[..., None], change(args[0]), output)
        )
        for layer, change in changes.items()
    ]
    logits = base(ids).logits
    for handle in handles:
        handle.remove()
    return logits


def loss_reference(base, blocks, dictionaries, skip_first, special=()):
    """The loss metrics by definition: one plain forward for each changed model, everything in float64."""
    ids, mask = counted_positions(blocks, skip_first, special)
    means = {}
    for layer in dictionaries:
        _, output, original = mlp_activations(base, ids, layer)
        means[layer] = output[mask].double().mean(0).float()
    changed = {
        "ce_original": original,
        "ce_spliced": logits_with(
            base, ids, mask, {i: lambda x, d=d: d(x).reconstruction for i, d in dictionaries.items()}
        ),
        "ce_zero_ablated": logits_with(base, ids, mask, dict.fromkeys(dictionaries, torch.zeros_like)),
        "ce_mean_ablated": logits_with(
            base, ids, mask, {i: lambda x, m=means[i]: m.expand_as(x) for i in dictionaries}
        ),
    }
    counted, labels = mask[:, :-1], ids[:, 1:]
    log_probs = {k: v[:, :-1][counted].double().log_softmax(-1) for k, v in changed.items()}
    metrics = {k: F.nll_loss(v, labels[counted]).item() for k, v in log_probs.items()}
    original = log_probs["ce_original"]
    for ending, name in (("", "spliced"), ("_zero_ablated", "zero_ablated"), ("_mean_ablated", "mean_ablated")):
        changed = log_probs[f"ce_{name}"]
        metrics[f"kl{ending}"] = (original.exp() * (original - changed)).sum(-1).mean().item()
        metrics[f"top1_agreement{ending}"] = (original.argmax(-1) == changed.argmax(-1)).double().mean().item()
    return metrics


@pytest.mark.parametrize("layer", [0, 1, 2])
@pytest.mark.parametrize("skip_first, special", [(0, ()), (1, ()), (2, (2,))])
@torch.no_grad()
def test_losses_equal_separate_forwards(base, blocks, layer, skip_first, special):
    dictionary = random_dictionary(base, layer, k=8)
    report = evaluator(base, blocks, skip_first=skip_first, special_token_ids=special).evaluate(dictionary)
    (entry,) = report.dictionaries.values()
    expected = loss_reference(base, blocks, {layer: dictionary}, skip_first, special)
    metrics = entry["metrics"]
    assert {name: metrics[name] for name in LOSS_METRICS} == pytest.approx(expected, abs=1e-4)
    for kind in ("zero", "mean"):
        recovered = ce_recovered(expected["ce_original"], expected["ce_spliced"], expected[f"ce_{kind}_ablated"])
        assert metrics[f"ce_recovered_{kind}"] == pytest.approx(recovered, rel=1e-2)
    _, mask = counted_positions(blocks, skip_first, special)
    assert report.protocol["fidelity_tokens"] == mask.sum()
    assert report.protocol["loss_tokens"] == mask[:, :-1].sum()


@torch.no_grad()
def test_together_equals_separate_forwards(base, blocks):
    dictionaries = {layer: random_dictionary(base, layer, seed=layer, k=8) for layer in (0, 2)}
    report = evaluator(base, blocks).evaluate(TranscoderSet(dictionaries.values()), together=True)
    expected = loss_reference(base, blocks, dictionaries, skip_first=1)
    assert {name: report.together[name] for name in LOSS_METRICS} == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("activation, k", [("topk", 8), ("batchtopk", 8), ("relu", None), ("jumprelu", None)])
@torch.no_grad()
def test_fidelity_equals_definitions(base, blocks, activation, k):
    dictionary = random_dictionary(base, 1, activation, k=k)
    report = evaluator(base, blocks, special_token_ids=[2]).evaluate({"mine": dictionary})
    ids, mask = counted_positions(blocks, 1, (2,))
    inputs, targets, _ = mlp_activations(base, ids, 1)
    features = dictionary.encode(inputs[mask]).double()
    y, r = targets[mask].double(), dictionary(inputs[mask]).reconstruction.double()
    error = (y - r).square().sum()
    fvu = error / (y - y.mean(0)).square().sum()
    expected = {
        "l0": (features != 0).sum(-1).double().mean(),
        "l1": features.abs().sum(-1).mean(),
        "dead_fraction": (features == 0).all(0).double().mean(),
        "mse": (y - r).square().mean(),
        "normalized_mse": error / y.square().sum(),
        "fvu": fvu,
        "explained_variance": 1 - fvu,
        "cosine": F.cosine_similarity(y, r, dim=-1).mean(),
        "l2_ratio": (r.norm(dim=-1) / y.norm(dim=-1)).mean(),
        "relative_reconstruction_bias": r.square().sum() / (y * r).sum(),
    }
    metrics = report.dictionaries["mine"]["metrics"]
    # This random dictionary's reconstructions are almost at right angles to the targets, so y . r nearly cancels.
    for name, value in expected.items():
        tolerance = {"rel": 1e-3} if name == "relative_reconstruction_bias" else {"rel": 1e-5, "abs": 1e-6}
        assert metrics[name] == pytest.approx(value.item(), **tolerance), name
    histogram = report.dictionaries["mine"]["density_histogram"]
    assert sum(histogram["counts"]) + histogram["never_fired"] == 40
    assert histogram["never_fired"] == round(expected["dead_fraction"].item() * 40)


@pytest.mark.parametrize("site", ["layers.1.mlp.branch", "layers.0.resid_pre", "layers.2.resid_post"])
def test_a_perfect_dictionary_loses_nothing(base, blocks, site):
    report = evaluator(base, blocks).evaluate(perfect_autoencoder(base, site))
    (entry,) = report.dictionaries.values()
    metrics = entry["metrics"]
    assert metrics["fvu"] == pytest.approx(0, abs=1e-12)
    assert metrics["ce_recovered_zero"] == pytest.approx(1, abs=1e-5)
    assert metrics["ce_recovered_mean"] == pytest.approx(1, abs=1e-5)
    assert metrics["kl"] == pytest.approx(0, abs=1e-6)
    assert metrics["top1_agreement"] == 1


@torch.no_grad()
def test_a_constant_dictionary_is_an_ablation(base, blocks):
    ids, mask = counted_positions(blocks, 1)
    _, outputs, _ = mlp_activations(base, ids, 1)
    dictionaries = {"zero": random_dictionary(base, 1, k=1), "mean": random_dictionary(base, 1, k=1)}
    for dictionary in dictionaries.values():
        dictionary.W_dec.zero_()
        dictionary.b_dec.zero_()
    dictionaries["mean"].b_dec.copy_(outputs[mask].mean(0))
    report = evaluator(base, blocks).evaluate(dictionaries)
    zero, mean = (report.dictionaries[name]["metrics"] for name in ("zero", "mean"))
    assert zero["ce_recovered_zero"] == pytest.approx(0, abs=1e-5)
    assert mean["ce_recovered_mean"] == pytest.approx(0, abs=1e-5)
    assert mean["fvu"] == pytest.approx(1, abs=1e-6)
    assert abs(zero["ce_recovered_mean"]) > 1e-3 and abs(mean["ce_recovered_zero"]) > 1e-3


def test_blocks_below_a_change_run_once(base, blocks):
    calls = dict.fromkeys(range(3), 0)
    for layer in calls:
        # An instance's forward, because a hook would also be called for a block that is skipped.
        block, forward = base.model.layers[layer].self_attn, base.model.layers[layer].self_attn.forward

        def counted(*args, layer=layer, forward=forward, **kwargs):
            calls[layer] += 1
            return forward(*args, **kwargs)

        block.forward = counted
    evaluator(base, blocks, batch_size=7).evaluate(random_dictionary(base, 2, k=8))
    # Fidelity and the original; in the last block also zero, mean and spliced.
    assert calls == {0: 2, 1: 2, 2: 5}


def test_many_dictionaries_equal_each_alone(base, blocks):
    # More changed models than keep their hidden states at once.
    dictionaries = {f"{i}": random_dictionary(base, i % 3, seed=i, k=4) for i in range(18)}
    measured = evaluator(base, blocks).evaluate(dictionaries).dictionaries
    for name in ("0", "9", "17"):
        alone = evaluator(base, blocks).evaluate({name: dictionaries[name]}).dictionaries
        assert measured[name]["metrics"] == pytest.approx(alone[name]["metrics"], abs=1e-6)


def test_the_models_are_left_as_they_were(base, blocks):
    dictionary = random_dictionary(base, 1, k=4).train()
    base.train()
    evaluator(base, blocks).evaluate(dictionary)
    assert base.training and dictionary.training
    assert all("forward" not in module.__dict__ for module in base.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in base.modules())


SIZES = {"vocab_size": 60, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
FAMILIES = {
    "gpt2": GPT2Config(vocab_size=60, n_embd=16, n_layer=3, n_head=2, n_positions=32),
    "gpt_neox": GPTNeoXConfig(**SIZES, intermediate_size=32),
    "gemma2": Gemma2Config(
        **SIZES, intermediate_size=32, num_key_value_heads=1, head_dim=8, final_logit_softcapping=2.0, sliding_window=4
    ),
    "gemma3": Gemma3TextConfig(**SIZES, intermediate_size=32, num_key_value_heads=1, head_dim=8, sliding_window=4),
    "opt": OPTConfig(
        vocab_size=60,
        hidden_size=16,
        ffn_dim=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        word_embed_proj_dim=8,
        max_position_embeddings=32,
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_partial_forwards_equal_whole_ones(family):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(FAMILIES[family]).eval()
    for parameter in model.parameters():
        parameter.normal_(std=0.3)
    ids = torch.randint(3, 60, (2, 12))
    expected = model(ids).logits
    with record_block_outputs(model, {0, 1}) as below:
        hidden = final_hidden_states(model, ids)
    assert torch.equal(logits_of(model, hidden.flatten(0, 1)), expected.flatten(0, 1))
    for layer in (1, 2):
        with restart_at(model, layer, below[layer - 1]):
            assert torch.equal(final_hidden_states(model, ids), hidden)
    assert torch.equal(model(ids).logits, expected)


def test_module_sites_start_at_their_block(base, blocks):
    dictionary = random_dictionary(base, 1, k=8)
    by_point = evaluator(base, blocks).evaluate({"d": dictionary}).dictionaries["d"]["metrics"]
    dictionary.config.input_site = "module:model.layers.1.mlp:in"
    dictionary.config.output_site = "module:model.layers.1.mlp:out"
    by_module = evaluator(base, blocks).evaluate({"d": dictionary}).dictionaries["d"]["metrics"]
    assert by_module == by_point


def test_token_budgets_and_protocol(base, blocks):
    dataset = datasets.Dataset.from_list(blocks, split="validation")
    report = evaluator(base, dataset, max_tokens=40, max_loss_tokens=12, dataset_name="made up").evaluate(
        random_dictionary(base, 0, k=4)
    )
    protocol = report.protocol
    assert (protocol["fidelity_tokens"], protocol["loss_tokens"]) == (44, 20)  # whole blocks of 11 and 10
    assert (protocol["dataset"], protocol["dataset_split"]) == ("made up", "validation")
    assert protocol["begins_with_bos"] and protocol["sequence_length"] == 12 and protocol["skip_first"] == 1
    assert protocol["dtype"] == "float32"

    def stream():
        yield from blocks[:4]
        raise AssertionError("read further than asked")

    streamed = datasets.IterableDataset.from_generator(stream)
    again = evaluator(base, streamed, max_tokens=40, max_loss_tokens=12).evaluate(random_dictionary(base, 0, k=4))
    assert again.dictionaries == report.dictionaries


def test_report_forms(base, blocks, tmp_path):
    few = {"a": random_dictionary(base, 0, k=4), "b|b": random_dictionary(base, 2, k=4)}
    report = evaluator(base, blocks).evaluate(few, together=True)
    report.dictionaries["a"]["metrics"]["kl"] = float("nan")
    path = report.save_json(tmp_path / "report.json")
    content = json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert content["dictionaries"]["a"]["metrics"]["kl"] is None
    assert list(tmp_path.iterdir()) == [path]
    assert EvaluationReport.load_json(path).to_text() == report.to_text()

    lines = report.to_text().splitlines()
    head, rows = lines[0], lines[2 : lines.index("")]
    assert head.split("  ")[0] == "metric" and "all together" in head
    assert len(rows) == 22 and {len(line) for line in rows} == {len(head)}
    assert "FVU" in report.markdown() and "b\\|b" in report.markdown()
    assert len({line.count(" | ") for line in report.markdown().splitlines()[:20]}) == 1

    many = {str(i): random_dictionary(base, 1, seed=i, k=4) for i in range(5)}
    wide = evaluator(base, blocks).evaluate(many).to_text().splitlines()
    assert wide[0].startswith("dictionary") and wide[2].startswith("0")


def test_numbers_that_are_none_are_announced(base, blocks, tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr("hf_transcoders.evaluation.evaluator.logger.warning", said.append)
    good, broken = random_dictionary(base, 0, k=4), random_dictionary(base, 2, k=4)
    with torch.no_grad():
        broken.W_dec[:] = float("nan")
    report = evaluator(base, blocks).evaluate({"good": good, "broken": broken}, together=True)
    assert said == report.warnings and len(said) == 2
    assert "'broken' has no finite MSE, CE spliced, KL to original" in said[0] and "'all together'" in said[1]
    for text in (report.to_text(), report.markdown()):
        assert all(sentence[:20] in text for sentence in said) and "WARNING" in text
    assert report.to_dict()["warnings"] == said
    assert EvaluationReport.load_json(report.save_json(tmp_path / "report.json")).warnings == said
    # Dividing by zero does not count against the dictionary.
    alone = evaluator(base, blocks).evaluate({"good": good})
    alone.dictionaries["good"]["metrics"].update(fvu=float("inf"), ce_recovered_zero=float("nan"))
    assert alone.warnings == [] and "warnings" not in alone.to_dict() and "WARNING" not in alone.to_text()


def test_a_wide_report_of_a_whole_set_shows_what_replaces_what(base, blocks):
    sites = [(layer, output) for layer in range(LAYERS) for output in ("mlp.branch", "resid_post")]
    named = {f"{i}.{output}": random_dictionary(base, i, output=output, k=4) for i, output in sites}
    report = evaluator(base, blocks).evaluate(named, together=True)
    _, replacement, _ = re.split(r"\n\n(?=The language model |\*\*Protocol)", report.markdown())
    head, _, *rows = [line.strip("| ").split(" | ") for line in replacement.splitlines()[2:]]
    assert f"cross-entropy {format_number(report.together['ce_original'])}" in replacement
    assert head == ["dictionary", *(METRICS[metric] for metric in REPLACEMENT_METRICS)]
    for row, (name, metrics) in zip(rows, report.columns().items(), strict=True):
        assert row == [escape(name), *(format_number(metrics[metric]) for metric in REPLACEMENT_METRICS)]
    assert rows[-1][0] == "all together"
    assert head[-1] in report.to_text() and rows[-1][-1] in report.to_text()

    # A report that an earlier version wrote has no such numbers of the ablations, and no empty columns for them.
    for metrics in report.columns().values():
        del metrics["kl_zero_ablated"], metrics["top1_agreement_zero_ablated"]
    assert "KL zero-ablated" not in report.markdown() and "KL mean-ablated" in report.markdown()


def test_refusals(base, blocks):
    dictionary = random_dictionary(base, 1, k=4)
    with pytest.raises(TranscoderError, match="empty"):
        evaluator(base, [])
    with pytest.raises(TranscoderError, match="no column `input_ids`"):
        evaluator(base, [{"text": "a"}])
    with pytest.raises(TranscoderError, match="pack longer blocks"):
        evaluator(base, [{"input_ids": [1, 2]}])
    with pytest.raises(TranscoderError, match="not one dataset but a dict of train, test"):
        evaluator(base, {"train": [{"input_ids": [1, 2, 3]}], "test": []})
    with pytest.raises(TranscoderError, match="special token"):
        evaluator(base, [{"input_ids": [1, 2, 2]}], special_token_ids=[2])
    with pytest.raises(TranscoderError, match="AutoModelForCausalLM"):
        evaluator(LlamaModel(base.config), blocks)
    with pytest.raises(TranscoderError, match="at least one"):
        evaluator(base, blocks).evaluate({})
    with pytest.raises(TranscoderError, match="both write"):
        evaluator(base, blocks).evaluate({"a": dictionary, "b": dictionary}, together=True)

    wide = random_dictionary(base, 1, k=4, d_in=2 * WIDTH)
    with pytest.raises(TranscoderError, match=f"width {2 * WIDTH}"):
        evaluator(base, blocks).evaluate(wide)
    lost = random_dictionary(base, 1, k=4)
    lost.config.input_site = None
    with pytest.raises(TranscoderError, match="config.input_site"):
        evaluator(base, blocks).evaluate({"lost": lost})

    base.model.layers[0].mlp.down_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(TranscoderError, match="not all finite"):
        evaluator(base, blocks).evaluate(dictionary)


def test_token_blocks_are_evaluated_as_their_rows(base, blocks):
    dictionary = random_dictionary(base, 1)
    given = TokenBlocks(blocks, max_tokens=50, skip_first=2, special_token_ids=[2])
    of_rows = evaluator(base, blocks, max_tokens=50, skip_first=2, special_token_ids=[2]).evaluate(dictionary)
    assert evaluator(base, given).evaluate(dictionary).to_dict() == of_rows.to_dict()
    for argument in ({"max_tokens": 50}, {"skip_first": 2}, {"special_token_ids": [2]}):
        with pytest.raises(TranscoderError, match="leave them out"):
            evaluator(base, given, **argument)
