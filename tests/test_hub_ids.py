"""Names of repos are told from paths, and missing paths are refused without asking the Hub."""

import huggingface_hub
import pytest

from hf_transcoders import TranscoderConfig, TranscoderModel, TranscoderSet, load_language_model, load_texts
from hf_transcoders.errors import OSTranscoderError, TranscoderError
from hf_transcoders.hub_ids import is_hub_id, is_local, refuse_missing


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with one run, as the current folder."""
    (tmp_path / "runs" / "l8").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    return tmp_path


def no_network(monkeypatch):
    """Online as far as anyone knows, and every request is a failure of the test."""

    def refuse(*args, **kwargs):
        raise AssertionError("the Hub was asked")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    for name in ("get_session", "http_backoff"):
        monkeypatch.setattr(f"huggingface_hub.utils._http.{name}", refuse)
    assert not huggingface_hub.is_offline_mode()


LOCAL = [
    "runs/l9", "runs/l8/checkpoint-7", "runs", "./x/y", "../x", "/no/x", "~/x", "x/checkpoint-100", "x/data.txt", "data.jsonl.gz",
    "x/model.safetensors", "a\\b", "run.yaml",
]  # fmt: skip
REPOS = ["openai-community/gpt2", "gpt2", "me/l9", "google/gemma-2-2b", "me/my.model-v1.5"]


@pytest.mark.parametrize("name", LOCAL)
def test_paths(place, monkeypatch, name):
    no_network(monkeypatch)
    assert is_local(name) and not is_hub_id(name)
    if name != "runs":
        with pytest.raises(OSTranscoderError, match=r"^There is no folder .*: try another\.$"):
            refuse_missing(name, "try another")


@pytest.mark.parametrize("name", REPOS)
def test_repos(place, monkeypatch, name):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    assert is_hub_id(name) and not is_local(name)
    refuse_missing(name, "try another")
    refuse_missing("google/gemma-scope-2b-pt-res/layer_12/width_16k/average_l0_71/params.npz", "try another")


def test_what_is_no_name_of_a_repo():
    for name in (None, "a//b", "a/b/c", "what is this", "", "x" * 100):
        assert not is_hub_id(name)


def test_offline_only_downloads_can_be_read(place):
    with pytest.raises(OSTranscoderError, match="no folder me/l9, and no download of this name.* offline"):
        refuse_missing("me/l9", "try another")
    (place / "cache" / "models--me--l9").mkdir(parents=True)
    refuse_missing("me/l9", "try another")
    refuse_missing("me/l9/layer_3", "try another")
    with pytest.raises(OSTranscoderError, match="no folder me/l9"):
        refuse_missing("me/l9", "try another", cache_dir=place / "other")


def test_a_download_next_to_a_folder_of_its_owner(place, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    assert is_local("runs/gpt2")
    (place / "cache" / "models--runs--gpt2").mkdir(parents=True)
    assert is_hub_id("runs/gpt2")


@pytest.mark.parametrize(
    "load",
    [TranscoderModel.from_pretrained, TranscoderSet.from_pretrained, load_language_model, load_texts],
    ids=lambda function: function.__qualname__,
)
def test_every_loader_refuses_a_missing_folder_at_once(place, monkeypatch, load):
    no_network(monkeypatch)
    for name in ("runs/l9", "./l9", "runs/l8/checkpoint-9"):
        with pytest.raises(TranscoderError, match=f"There is no (folder|file or folder) {name}"):
            load(name)


def test_configurations_are_not_in_the_way(place):
    """AutoConfig and `TranscoderConfig.from_pretrained` are those of transformers."""
    with pytest.raises(OSError):
        TranscoderConfig.from_pretrained("runs/l9")
