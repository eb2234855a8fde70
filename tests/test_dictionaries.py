"""One answer, for every use, to whether a dictionary belongs to a model."""

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from hf_transcoders import TranscoderError, TranscoderEvaluator, TranscoderTrainer, TranscoderTrainingArguments
from hf_transcoders.circuits import FeatureEdit, FeatureWeights, attribution_graph, greedy_paths, intervene
from hf_transcoders.dictionaries import (
    find_dictionary,
    fitting_dictionaries,
    may_be_same_model,
    named_dictionaries,
)
from hf_transcoders.evaluation import DriftProbe
from hf_transcoders.features import explain_features
from hf_transcoders.models import TranscoderConfig, TranscoderModel
from tests.tiny_models import HIDDEN_SIZE, tiny_model, tiny_tokens


def transcoder(layer=1, **changes):
    sites = {"input_site": f"layers.{layer}.mlp.in", "output_site": f"layers.{layer}.mlp.out"}
    return TranscoderModel(
        TranscoderConfig(**{"d_in": HIDDEN_SIZE, "num_features": 12, "activation": "topk", "k": 3, **sites, **changes})
    ).eval()


def _rows():
    return [{"input_ids": row} for row in tiny_tokens(4).tolist()]


def _tokenizer():
    vocabulary = {f"w{i}": i for i in range(tiny_model("gpt2").config.vocab_size)}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(vocabulary, unk_token="w0")))


def _train(model, dictionary):
    args = TranscoderTrainingArguments("unused", max_steps=1, per_device_train_batch_size=1, report_to=[])
    return TranscoderTrainer(dictionary, model, args, train_dataset=_rows())


def _intervene(model, dictionary):
    edit = FeatureEdit("layers.1.mlp.transcoder", 0, position="all")
    with intervene(model, [dictionary], [edit]):
        pass


USES = {
    "training": _train,
    "evaluation": lambda model, dictionary: TranscoderEvaluator(model, _rows()).evaluate(dictionary),
    "drift": lambda model, dictionary: DriftProbe([dictionary], _rows()).check(model),
    "examples": lambda model, dictionary: explain_features(model, dictionary, _rows(), _tokenizer(), features=[0]),
    "weights": lambda model, dictionary: FeatureWeights(model, [dictionary]),
    "graph": lambda model, dictionary: attribution_graph(model, [dictionary], tiny_tokens(1)[0].tolist()),
    "paths": lambda model, dictionary: greedy_paths(model, [dictionary], tiny_tokens(1)[0].tolist()),
    "interventions": _intervene,
}

MISFITS = {
    "another model": (
        {"base_model_type": "gpt2", "base_model_name_or_path": "gpt2"},
        "is for gpt2, and this is distilgpt2",
    ),
    "another owner": (
        {"base_model_name_or_path": "me/distilgpt2-x"},
        "is for me/distilgpt2-x, and this is distilgpt2",
    ),
    "another type": ({"base_model_type": "llama"}, "is for a model of type 'llama'"),
    "another revision": ({"base_model_revision": "aaa"}, "is for revision aaa"),
    "another width": ({"d_in": 24, "d_out": HIDDEN_SIZE}, "has width 24 at 'layers.1.mlp.in'"),
    "a deeper model": ({"input_site": "layers.9.mlp.in"}, "this model has the layers 0 to 2"),
    "no site": ({"input_site": None, "output_site": None}, "does not say where it belongs"),
}


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("misfit", MISFITS)
def test_every_use_refuses_the_same_dictionaries(use, misfit):
    model = tiny_model("gpt2")
    model.config.name_or_path, model.config._commit_hash = "distilgpt2", "bbb"
    changes, said = MISFITS[misfit]
    with pytest.raises(TranscoderError, match=said):
        USES[use](model, transcoder(**changes))


@pytest.mark.parametrize("use", USES)
def test_every_use_accepts_the_same_dictionary(use):
    model = tiny_model("gpt2")
    model.config.name_or_path, model.config._commit_hash = "openai-community/gpt2", "bbb"
    known = {"base_model_type": "gpt2", "base_model_name_or_path": "gpt2", "base_model_revision": "bbb"}
    USES[use](model, transcoder(**known))


@pytest.mark.parametrize(
    "one, other, same",
    [
        ("gpt2", "openai-community/gpt2", True),
        ("OpenAI-community/GPT2", "openai-community/gpt2", True),
        ("gpt2", "distilgpt2", False),
        ("me/gpt2", "openai-community/gpt2", False),
        (None, "gpt2", True),
        ("", "gpt2", True),
        ("./gpt2", "distilgpt2", True),
        ("/models/gpt2", "distilgpt2", True),
        ("a/b/c", "distilgpt2", True),
    ],
)
def test_names_of_one_model(one, other, same):
    assert may_be_same_model(one, other) is same
    assert may_be_same_model(other, one) is same


def test_the_path_of_a_folder_is_not_an_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert not may_be_same_model("runs/model", "gpt2")
    (tmp_path / "runs" / "model").mkdir(parents=True)
    assert may_be_same_model("runs/model", "gpt2")


def test_dictionaries_by_name():
    first, second = transcoder(0), transcoder(1)
    names = ["layers.0.mlp.transcoder", "layers.1.mlp.transcoder"]
    assert list(named_dictionaries(iter([first, second]))) == names
    assert named_dictionaries({"a": first}) == {"a": first} and named_dictionaries([]) == {}
    named = named_dictionaries([first, second])
    assert find_dictionary(named, "layers.1.mlp.out", 11) == names[1]
    with pytest.raises(TranscoderError, match="no feature 12"):
        find_dictionary(named, names[0], 12)
    with pytest.raises(TranscoderError, match="no dictionary called 'x'"):
        find_dictionary(named, "x", 0)


def test_what_cannot_be_written_is_refused_where_it_would_be():
    model = tiny_model("gpt2")
    sae = transcoder(input_site="layers.1.resid_mid", output_site="layers.1.resid_mid")
    with pytest.raises(TranscoderError, match="can be read but not written"):
        fitting_dictionaries(model, [sae])
