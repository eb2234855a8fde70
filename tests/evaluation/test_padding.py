"""Every number of an evaluation is that of the texts alone, however the rows are padded."""

import copy

import pytest
import torch

from hf_transcoders import TranscoderConfig, TranscoderError, TranscoderEvaluator, TranscoderModel, explain_features
from hf_transcoders.data.token_blocks import TokenBlocks
from hf_transcoders.evaluation import DriftProbe
from hf_transcoders.lm import replace
from tests.texts import MODELS, SWITCH, alone, make_model, make_texts, padded
from tests.tiny_models import tiny_model


READ, WRITE = "layers.1.mlp.in", "layers.1.mlp.branch"
TEXTS = make_texts(12, 9, 6, 12, 1, 7, 2, 10)
SKIP = 1


def make_dictionary(model, seed=1):
    torch.manual_seed(seed)
    config = TranscoderConfig.for_model(model, READ, WRITE, num_features=24, activation="relu")
    dictionary = TranscoderModel(config).eval()
    with torch.no_grad():
        for parameter in dictionary.parameters():
            parameter.normal_(std=0.2)
    return dictionary


def losses(logits, text):
    """Padding tokens after the tokens that count."""
    picked = logits[SKIP:-1].log_softmax(-1)
    return -picked.gather(-1, torch.tensor(text[SKIP + 1 :])[:, None])[:, 0]


@torch.no_grad()
def reference(name, dictionary):
    """CE, CE with the dictionary in place, FVU, L0 and tokens, one text at a time by plain PyTorch."""
    original, spliced, inputs, targets = [], [], [], []
    for text in TEXTS:
        model = make_model(name)
        logits, read, written = alone(model, text, READ, WRITE)
        original.append(losses(logits, text))
        inputs.append(read[SKIP:])
        targets.append(written[SKIP:])
        model = make_model(name)
        mask = torch.arange(len(text))[None] >= SKIP
        with replace(model, {WRITE: dictionary}, mask=mask):
            spliced.append(losses(alone(model, text)[0], text))
    output = dictionary(torch.cat(inputs))
    targets = torch.cat(targets)
    error = (targets - output.reconstruction).double().square().sum()
    return {
        "ce_original": torch.cat(original).mean().item(),
        "ce_spliced": torch.cat(spliced).mean().item(),
        "fvu": (error / (targets.double() - targets.double().mean(0)).square().sum()).item(),
        "l0": (output.features > 0).sum(-1).double().mean().item(),
    }, (len(targets), len(torch.cat(original)))


@pytest.mark.parametrize("name", MODELS)
def test_evaluation_is_that_of_each_text_alone(name):
    model = make_model(name)
    dictionary = make_dictionary(model)
    expected, (fidelity_tokens, loss_tokens) = reference(name, dictionary)
    for how in ("left", "right", "mixed"):
        rows = [*padded(TEXTS, how), {"input_ids": []}]
        report = TranscoderEvaluator(model, rows, batch_size=3, skip_first=SKIP, progress=False).evaluate([dictionary])
        ((_, entry),) = report.dictionaries.items()
        assert {key: entry["metrics"][key] for key in expected} == pytest.approx(expected, rel=2e-5)
        protocol = report.protocol
        assert (protocol["fidelity_tokens"], protocol["loss_tokens"]) == (fidelity_tokens, loss_tokens)
        assert (protocol["shortest_sequence"], protocol["sequence_length"]) == (1, 12)
    assert "1 to 12 tokens" in report.protocol_lines()["blocks"]


def test_zero_and_mean_ablation_of_padded_rows():
    model = tiny_model("opt")
    dictionary = make_dictionary(model)
    numbers = []
    for how in ("right", "left", "ragged"):
        report = TranscoderEvaluator(model, padded(TEXTS, how), batch_size=3, progress=False).evaluate(
            [dictionary], together=True
        )
        ((_, entry),) = report.dictionaries.items()
        numbers.append(entry["metrics"] | {f"together/{key}": value for key, value in report.together.items()})
    for other in numbers[1:]:
        assert other == numbers[0]


def test_a_special_token_does_not_count_but_is_predicted():
    model = tiny_model("gpt2")
    texts = [[5, 9, 7, 8], [6, 7, 9]]
    rows = padded(texts, "left")
    blocks = TokenBlocks(rows, max_tokens=100, skip_first=1, special_token_ids=[9])
    (batch,) = blocks.batches(model, 8)
    assert batch.numbers == [1, 0]  # Those of similar length share a batch, the shorter ones first.
    assert batch.mask.tolist() == [[False, True, False, False], [False, False, True, True]]
    assert batch.labels.tolist() == [9, 8]
    assert batch.inputs["attention_mask"].tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]


def test_rows_are_read_as_far_as_they_are_needed():
    def rows():
        yield from padded(TEXTS, "left")[:3]
        raise AssertionError("One row too many was read.")

    blocks = TokenBlocks(rows(), max_tokens=11 + 8 + 5, skip_first=1)
    assert (blocks.tokens, blocks.lengths) == (24, [12, 9, 6])
    assert blocks.first(12).lengths == [12, 9] and blocks.first(11).lengths == [12]
    # There is nothing to predict in a block of which one token counts.
    short = TokenBlocks([{"input_ids": [5, 6]}, {"input_ids": [5, 6, 7]}], max_tokens=9, skip_first=1)
    assert short.first(1).lengths == [2, 3]


@pytest.mark.parametrize(("name", "how"), [("gpt2", "left"), ("mistral", "mixed"), ("longrope", "holes")])
def test_contexts_show_the_text_alone(name, how):
    """No padding, no neighbour, and the activations of each text by itself."""
    model = make_model(name)
    dictionary = make_dictionary(model)

    class Words:
        def convert_ids_to_tokens(self, ids):
            return [f"w{id_}" for id_ in ids]

        def batch_decode(self, rows, **kwargs):
            return [f"w{id_}" for (id_,) in rows]

    found = explain_features(
        model, dictionary, padded(TEXTS, how), Words(), features="active", num_contexts=4, window=4, batch_size=3, progress=False
    )  # fmt: skip
    assert len(found) > 5
    read = [alone(name, text, READ)[1] for text in TEXTS]
    with torch.no_grad():
        activations = [dictionary.encode(values) for values in read]
    for feature in found:
        counted = torch.cat([values[SKIP:, feature.feature] for values in activations])
        assert feature.density == pytest.approx((counted > 0).double().mean().item())
        assert feature.max_activation == pytest.approx(counted.max().item(), rel=1e-4)
        for context in feature.contexts:
            text = TEXTS[context.row]
            start, end = max(0, context.position - 4), min(context.position + 5, len(text))
            assert context.tokens == [f"w{id_}" for id_ in text[start:end]]
            own = activations[context.row][start:end, feature.feature].clone()
            own[: max(0, SKIP - start)] = 0
            assert context.activations == pytest.approx(own.tolist(), rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("name", ["gpt2", "dynamic"])
def test_drift_of_padded_rows_is_that_of_the_texts(name, tmp_path):
    before, after = make_model(name), make_model(name)
    with torch.no_grad():
        after.get_output_embeddings().weight[5] += 0.5
        next(iter(after.get_decoder().parameters())).mul_(1.05)
    reports = []
    for how in ("ragged", "left", "holes"):
        probe = DriftProbe([make_dictionary(before)], padded(TEXTS, how), batch_size=3, max_kl_tokens=20)
        probe.take_baseline(before)
        reports.append(probe.measure(after))
        probe.save_baseline(tmp_path / how)
    for other in reports[1:]:
        assert other.to_dict() == reports[0].to_dict()
    # The mean over the first texts with 20 tokens that count.
    divergences = []
    for text in TEXTS[:3]:
        p, q = (alone(copy.deepcopy(model), text)[0][SKIP:-1].double().log_softmax(-1) for model in (before, after))
        divergences.append((p.exp() * (p - q)).sum(-1))
    assert reports[0].model["kl"] == pytest.approx(torch.cat(divergences).mean().item(), rel=1e-3)
    # A baseline serves the same text, however it is padded, and no other.
    probe.load_baseline(tmp_path / "ragged")
    other = DriftProbe([make_dictionary(before)], [*padded(TEXTS, "left")[:-1], {"input_ids": [*TEXTS[-1], 0]}])
    with pytest.raises(TranscoderError, match="other probe text"):
        other.load_baseline(tmp_path / "ragged")


def test_refused():
    gpt2, dictionary = tiny_model("gpt2"), make_dictionary(tiny_model("gpt2"))

    def evaluate(rows, **changes):
        return TranscoderEvaluator(gpt2, rows, progress=False, **changes).evaluate([dictionary])

    for row, message in (
        ({"input_ids": [5, 6, 128]}, "Row 1 has token 128, which the model does not know"),
        ({"input_ids": [-1, 6, 7]}, "Row 1 has token -1, which the model does not know"),
        ({"input_ids": [5] * 65}, "Row 1 has 65 tokens and the model's context 64"),
        ({"input_ids": [5, 6], "attention_mask": [1]}, "Row 1 of the evaluation dataset has 2 tokens and"),
        ([5, 6], "Row 1 of the evaluation dataset has no column `input_ids`"),
    ):
        with pytest.raises(TranscoderError, match=message):
            evaluate([{"input_ids": [5, 6, 7]}, row])
    with pytest.raises(TranscoderError, match="have 1 tokens: .* at least 3 are needed"):
        evaluate([{"input_ids": [5, 6], "attention_mask": [0, 1]}, {"input_ids": []}])
    with pytest.raises(TranscoderError, match="have 0 tokens"):
        evaluate([{"input_ids": [5, 6, 7], "attention_mask": [0, 0, 0]}])
    with pytest.raises(TranscoderError, match="single block"):
        DriftProbe([dictionary], [{"input_ids": [5, 6, 7]}, {"input_ids": []}])


def test_a_model_is_left_as_it_was_loaded():
    """Rotary frequencies of a longer text do not stay for later forward passes."""
    model, dictionary = make_model("dynamic"), make_dictionary(make_model("dynamic"))
    TranscoderEvaluator(model, padded(make_texts(12, 10), "left"), progress=False).evaluate([dictionary])
    (text,) = make_texts(SWITCH, seed=3)
    assert torch.equal(alone(model, text)[0], alone("dynamic", text)[0])
