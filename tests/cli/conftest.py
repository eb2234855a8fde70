"""Folders that several tests of the command line read."""

import pytest

from hf_transcoders import TranscoderSet
from tests.cli.setups import fill_workplace
from tests.studies.greater_than.setups import transcoder_of
from tests.studies.test_circuit_reuse import TOKENIZER, model_for_tasks


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    return fill_workplace(tmp_path_factory.mktemp("cli"))


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A tiny model for tasks, a set of transcoders of its three layers, one of them alone, and a text."""
    path = tmp_path_factory.mktemp("tasks")
    model = model_for_tasks()
    model.save_pretrained(path / "model")
    TOKENIZER.save_pretrained(path / "model")
    TranscoderSet([transcoder_of(model, layer) for layer in range(3)]).save_pretrained(path / "set")
    transcoder_of(model, 1).save_pretrained(path / "one")
    story = "When Mary and John went to the store, John gave a drink to Mary. "
    wars = [f"The war lasted from 17{n} to 18{n}, and so on." * 3 for n in range(60)]
    (path / "text.txt").write_text("\n\n".join([story * 60, *wars]))
    return path
