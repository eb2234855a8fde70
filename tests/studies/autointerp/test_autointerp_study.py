"""The comparison of dictionaries: features that are tokens are explained, and features of mixed directions are not."""

import json

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hf_transcoders import TranscoderConfig, TranscoderModel
from hf_transcoders.cli import main
from hf_transcoders.errors import TranscoderError
from hf_transcoders.studies.autointerp.autointerp_report import autointerp_charts, save_autointerp
from hf_transcoders.studies.autointerp.autointerp_results import autointerp_table
from hf_transcoders.studies.autointerp.study import autointerp_study

from ...features.explain.conftest import VOCABULARY, planted_text, tokenizer


__all__ = ["tokenizer"]

WORDS, WIDTH = len(VOCABULARY), 64


@pytest.fixture(scope="module")
def base():
    """A model in whose stream every token has a coordinate of its own."""
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=WORDS, hidden_size=WIDTH, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
                         num_key_value_heads=1, bos_token_id=None, eos_token_id=0)  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    model.model.embed_tokens.weight.data = torch.eye(WORDS, WIDTH)
    return model


def dictionary(base, rows, site="layers.0.resid_pre"):
    config = TranscoderConfig.for_model(base, site, num_features=len(rows), activation="relu")
    model = TranscoderModel(config).eval()
    with torch.no_grad():
        model.W_enc.copy_(rows)
        model.b_enc.zero_()
    return model


@pytest.fixture(scope="module")
def methods(base):
    mixed = torch.nn.functional.normalize(torch.randn(12, WIDTH, generator=torch.Generator().manual_seed(1)), dim=-1)
    return {
        "tokens": dictionary(base, torch.eye(WIDTH)[1:13]),
        "noise": dictionary(base, mixed, "layers.1.resid_post"),
    }


@pytest.fixture(scope="module")
def rows():
    return [{"input_ids": row.tolist()} for row in planted_text(400).view(-1)[: 16 * 64 * 12].view(-1, 64)]


def test_token_features_are_explained(base, methods, rows, tokenizer, tmp_path):
    study = autointerp_study(base, methods, rows, tokenizer, num_features=6, output_dir=tmp_path, progress=False)
    of_tokens, of_noise = study.dictionaries
    assert (of_tokens.method, of_tokens.layer, of_noise.layer) == ("tokens", 0, 1)
    for score in ("simulation.top_and_random", "simulation.random_only"):
        assert of_tokens.mean(score).mean > 0.99
        # Half of the tokens of any text fire it: by how much depends on all of them.
        assert of_noise.mean(score).mean < of_tokens.mean(score).mean
    table = autointerp_table(study)
    assert [row[0] for row in table.rows] == ["tokens", "noise"] and all(
        len(row) == len(table.headers) for row in table.rows
    )
    assert autointerp_charts(study)[0].series.keys() == {"tokens", "noise"}
    page = save_autointerp(study, tmp_path)
    assert "Pythia-70M" in page.read_text()
    again = autointerp_study(base, methods, rows, tokenizer, num_features=6, output_dir=tmp_path, progress=False)
    assert json.dumps(again.to_dict()) == json.dumps(study.to_dict())


def test_what_cannot_be_compared(base, methods, rows, tokenizer):
    with pytest.raises(TranscoderError, match="no dictionaries to compare"):
        autointerp_study(base, {}, rows, tokenizer)
    silent = dictionary(base, -torch.eye(WIDTH)[:3])
    with pytest.raises(TranscoderError, match="No feature of 'silent: .*' fires"):
        autointerp_study(base, {"silent": silent}, rows, tokenizer, progress=False)


@pytest.mark.parametrize(
    "given, message",
    [(["runs/sae"], "give its name and folder"), (["A=x", "A=y"], "two kinds of dictionary called 'A'")],
)
def test_names_of_kinds(given, message, capsys):
    assert main(["study", "autointerp", *given]) == 2
    assert message in capsys.readouterr().err
