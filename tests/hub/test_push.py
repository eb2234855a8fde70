"""Pushing and loading back through the Hub's protocol: what arrives, what is sent, what goes, what stays."""

import json
import logging
import os
import re

import pytest
import torch
from huggingface_hub import HfApi, constants, snapshot_download
from transformers import AutoModel

from hf_transcoders import TranscoderError, TranscoderModel, TranscoderSet
from hf_transcoders.hub.cards import is_generated, is_unedited, own_card
from hf_transcoders.hub.push_files import run_records
from hf_transcoders.hub.upload import push
from hf_transcoders.models.set_index import INDEX_NAME
from hf_transcoders.testing import local_hub
from hf_transcoders.tracking import LocalTracker, Run

from .conftest import READER, STRANGER, assert_same_function, make_dictionary, make_set


@pytest.fixture
def warnings(caplog):
    """What the package has said so far, as one text."""
    transformers_logger = logging.getLogger("transformers")
    package = logging.getLogger("hf_transcoders")
    for logger in (transformers_logger, package):
        logger.addHandler(caplog.handler)
    yield lambda: caplog.text
    for logger in (transformers_logger, package):
        logger.removeHandler(caplog.handler)


def test_push_and_load_in_a_cold_cache(hub):
    model = make_dictionary(normalization="standardize", skip_connection=True)
    info = model.push_to_hub("me/x", commit_message="First")
    assert hub.log("me/x") == ["First", "initial commit"]
    assert info.oid == hub.repos["me/x"].refs["main"]
    files = hub.files("me/x")
    assert {"README.md", "config.json", "model.safetensors"} <= files.keys()
    card = files["README.md"].decode()
    # Ours, not the generic one, and it names the repo that it was pushed to.
    assert "hf_transcoders" in card and '"me/x"' in card and "More Information Needed" not in card
    assert is_generated(card)
    assert not os.path.exists(constants.HF_HUB_CACHE)
    assert_same_function(model, TranscoderModel.from_pretrained("me/x"))
    assert_same_function(model, AutoModel.from_pretrained("me/x"))


def test_a_set_and_one_of_its_dictionaries_alone(hub):
    transcoders = make_set(3, 5)
    transcoders.push_to_hub("me/set")
    loaded = TranscoderSet.from_pretrained("me/set")
    assert list(loaded) == list(transcoders)
    for name in transcoders:
        assert_same_function(transcoders[name], loaded[name])
        assert_same_function(transcoders[name], TranscoderModel.from_pretrained("me/set", subfolder=name))
    (only,) = TranscoderSet.from_pretrained("me/set", names=["layers.5.mlp.transcoder"]).values()
    assert_same_function(only, transcoders["layers.5.mlp.transcoder"])


def test_save_pretrained_with_push_keeps_our_card(hub, tmp_path):
    model = make_dictionary()
    model.save_pretrained(tmp_path / "mine", push_to_hub=True, private=True)
    make_set(3, 5).save_pretrained(tmp_path / "set", push_to_hub=True, repo_id="me/other", commit_message="Both")
    assert hub.repos["me/mine"].private and is_generated(hub.files("me/mine")["README.md"].decode())
    assert hub.log("me/other")[0] == "Both"
    assert_same_function(model, TranscoderModel.from_pretrained(tmp_path / "mine"))


def test_pushing_again_without_a_change_sends_no_weights_and_makes_no_commit(hub):
    transcoders = make_set(3, 5)
    transcoders.push_to_hub("me/set")
    before, sent = hub.log("me/set"), hub.bytes_received("PUT", "/lfs/")
    assert sent == sum(len(c) for path, c in hub.files("me/set").items() if path.endswith(".safetensors"))
    hub.requests.clear()
    transcoders.push_to_hub("me/set")
    assert hub.log("me/set") == before
    assert hub.bytes_received("PUT", "/lfs/") == 0
    assert not [request for request in hub.requests if "/commit/" in request.path]


def test_only_what_changed_is_sent(hub):
    transcoders = make_set(3, 5)
    transcoders.push_to_hub("me/set")
    with torch.no_grad():
        transcoders["layers.5.mlp.transcoder"].b_enc.add_(1)
    hub.requests.clear()
    transcoders.push_to_hub("me/set")
    (put,) = [request for request in hub.requests if request.method == "PUT"]
    assert put.received == len(hub.files("me/set")["layers.5.mlp.transcoder/model.safetensors"])
    # The unchanged weights are not even named in the commit.
    (commit,) = [request for request in hub.requests if "/commit/" in request.path]
    assert commit.received < 1000
    loaded = TranscoderSet.from_pretrained("me/set")
    for name in transcoders:
        assert_same_function(transcoders[name], loaded[name])


def test_files_of_an_earlier_push_go_and_others_stay(hub, warnings):
    transcoders = make_set(3, 5)
    transcoders.push_to_hub("me/set", max_shard_size=3000, remote_code=True)
    shards = [path for path in hub.files("me/set") if re.search(r"-of-\d+\.safetensors", path)]
    assert len(shards) > 2
    api = HfApi()
    for path in ("notes.md", "layers.5.mlp.transcoder/notes.md", "model.gguf", "layers.9.mlp.transcoder/config.json"):
        api.upload_file(path_or_fileobj=b"not ours", path_in_repo=path, repo_id="me/set")
    commits = len(hub.log("me/set"))
    TranscoderSet({name: transcoders[name] for name in ["layers.3.mlp.transcoder"]}).push_to_hub("me/set")
    assert len(hub.log("me/set")) == commits + 1
    assert hub.files("me/set").keys() == {
        ".gitattributes", "README.md", INDEX_NAME,
        "layers.3.mlp.transcoder/config.json", "layers.3.mlp.transcoder/model.safetensors",
        "notes.md", "layers.5.mlp.transcoder/notes.md", "model.gguf", "layers.9.mlp.transcoder/config.json",
    }  # fmt: skip
    assert "layers.5.mlp.transcoder/config.json" in warnings()
    (loaded,) = TranscoderSet.from_pretrained("me/set").values()
    assert_same_function(loaded, transcoders["layers.3.mlp.transcoder"])


def test_a_set_in_place_of_a_dictionary_and_back(hub):
    single, transcoders = make_dictionary(), make_set(3, 5)
    single.push_to_hub("me/x")
    transcoders.push_to_hub("me/x")
    assert not {"config.json", "model.safetensors"} & hub.files("me/x").keys()
    single.push_to_hub("me/x")
    assert hub.files("me/x").keys() == {".gitattributes", "README.md", "config.json", "model.safetensors"}
    assert_same_function(single, TranscoderModel.from_pretrained("me/x"))


def test_a_model_of_another_kind_is_not_overwritten(hub):
    api = HfApi()
    api.create_repo("me/llama")
    api.upload_file(path_or_fileobj=b'{"model_type": "llama"}', path_in_repo="config.json", repo_id="me/llama")
    model = make_dictionary()
    with pytest.raises(TranscoderError, match=r"another kind \(llama\)"):
        model.push_to_hub("me/llama")
    model.push_to_hub("me/llama", subfolder="transcoders/l3")
    assert hub.files("me/llama")["config.json"] == b'{"model_type": "llama"}'
    assert is_generated(hub.files("me/llama")["transcoders/l3/README.md"].decode())
    assert_same_function(model, TranscoderModel.from_pretrained("me/llama", subfolder="transcoders/l3"))


def test_a_card_edited_on_the_hub_stays_until_it_is_removed(hub, warnings):
    model = make_dictionary()
    model.push_to_hub("me/x")
    edited = hub.files("me/x")["README.md"].decode().replace("\n## ", "\n\nWith love.\n\n## ", 1)
    api = HfApi()
    api.upload_file(path_or_fileobj=edited.encode(), path_in_repo="README.md", repo_id="me/x")
    with torch.no_grad():
        model.W_enc.mul_(2)
    model.push_to_hub("me/x")
    assert hub.files("me/x")["README.md"].decode() == edited
    assert "was edited on the Hub" in warnings()
    assert_same_function(model, TranscoderModel.from_pretrained("me/x"))
    api.delete_file("README.md", "me/x")
    model.push_to_hub("me/x")
    assert is_generated(hub.files("me/x")["README.md"].decode())


def test_a_card_by_hand_is_known_again_after_a_push(tmp_path):
    readme = tmp_path / "README.md"
    assert own_card(tmp_path) is None
    readme.write_text("# By hand")
    pushed = own_card(tmp_path).text
    assert pushed.startswith("# By hand\n<!-- Pushed") and is_unedited(pushed) and not is_generated(pushed)
    for edited in (pushed.replace("hand", "head"), "more\n" + pushed, pushed + "more\n", "# By hand"):
        assert not is_unedited(edited)
    # Downloaded and pushed again, it is still the same card by hand.
    readme.write_text(pushed)
    assert own_card(tmp_path).text == pushed


def test_revisions(hub):
    first, second = make_dictionary(seed=1), make_dictionary(seed=2)
    first.push_to_hub("me/x")
    second.push_to_hub("me/x", revision="try/two")
    second.push_to_hub("me/x", revision="try/two")
    assert_same_function(first, TranscoderModel.from_pretrained("me/x"))
    assert_same_function(second, TranscoderModel.from_pretrained("me/x", revision="try/two"))
    commit = hub.repos["me/x"].refs["main"]
    second.push_to_hub("me/x")
    assert_same_function(first, TranscoderModel.from_pretrained("me/x", revision=commit))
    assert_same_function(second, TranscoderModel.from_pretrained("me/x"))


def test_pull_requests(hub):
    first, second = make_dictionary(seed=1), make_dictionary(seed=2)
    first.push_to_hub("me/x")
    info = second.push_to_hub("me/x", create_pr=True)
    assert info.pr_url == f"{hub.url}/me/x/discussions/1"
    assert_same_function(first, TranscoderModel.from_pretrained("me/x"))
    assert_same_function(second, TranscoderModel.from_pretrained("me/x", revision="refs/pr/1"))
    # Somebody else may propose too, and may push to the proposal's own reference again.
    assert make_dictionary(seed=3).push_to_hub("me/x", create_pr=True, token=STRANGER).pr_url.endswith("/2")
    first.push_to_hub("me/x", revision="refs/pr/1")
    assert_same_function(first, TranscoderModel.from_pretrained("me/x", revision="refs/pr/1"))
    with pytest.raises(TranscoderError, match="either `create_pr` or `revision`"):
        first.push_to_hub("me/x", create_pr=True, revision="next")
    with pytest.raises(TranscoderError, match="There is no repo me/nothing"):
        first.push_to_hub("me/nothing", create_pr=True)


def test_private_repos(hub, tmp_path):
    model = make_dictionary()
    model.push_to_hub("me/secret", private=True)
    assert_same_function(model, TranscoderModel.from_pretrained("me/secret"))
    for token in (STRANGER, False):
        with pytest.raises(OSError, match="me/secret"):
            TranscoderModel.from_pretrained("me/secret", token=token, cache_dir=tmp_path)
    model.push_to_hub("me/open")
    with pytest.raises(TranscoderError, match="me/open exists and is public"):
        model.push_to_hub("me/open", private=True)


@pytest.mark.parametrize(
    ("repo_id", "token", "sentence"),
    [
        ("me/x", "hf_wrong", r"does not accept the token.*settings/tokens"),
        ("me/x", False, "not logged in"),
        ("me/x", READER, "may not write to me/x"),
        ("you/x", None, "may not write to you/x"),
        ("me/a b", None, "'me/a b' cannot name a repo"),
    ],
)
def test_refusals_are_one_sentence_and_change_nothing(hub, monkeypatch, repo_id, token, sentence):
    make_dictionary(seed=1).push_to_hub("me/x")
    before = hub.log("me/x")
    if token is False:
        monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(TranscoderError, match=sentence) as error:
        make_dictionary(seed=2).push_to_hub(repo_id, token=token or None)
    assert "\n" not in str(error.value)
    assert hub.log("me/x") == before and hub.repos.keys() == {"me/x"}


def test_offline_and_missing(hub, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(TranscoderError, match="unset it"):
        make_dictionary().push_to_hub("me/x")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(OSError, match="me/missing"):
        TranscoderModel.from_pretrained("me/missing")
    with pytest.raises(TranscoderError, match="me/missing is not a set"):
        TranscoderSet.from_pretrained("me/missing")


def test_records_of_a_run_go_along_but_no_token_does(hub, tmp_path, warnings):
    tracker = LocalTracker(tmp_path)
    tracker.start({"name": "run"})
    tracker.scalars(1, {"train/x/fvu": 0.5})
    tracker.table(1, "features", [{"feature": 3}])
    tracker.page(1, "features", "<p>")
    run = Run.load(tmp_path)
    model = make_dictionary()
    push(model, "me/x", run=run)
    pushed = {path for path in hub.files("me/x") if path.startswith("tracking/")}
    assert pushed == {"tracking/run.json", "tracking/scalars.jsonl", "tracking/tables/features.jsonl"}
    tracker.update(api_key="hf_" + "a" * 34)
    tracker.scalars(2, {"train/x/fvu": 0.25})
    (tmp_path / "tracking" / "tables" / "features.jsonl").unlink()
    assert set(run_records(run)) == {"tracking/scalars.jsonl"}
    push(model, "me/x", run=run)
    assert hub.files("me/x")["tracking/scalars.jsonl"].count(b"\n") == 2
    assert "access token" in warnings() and not any(b"aaaa" in content for content in hub.files("me/x").values())


def test_snapshot_and_listing(hub, tmp_path):
    make_set(3, 5).push_to_hub("me/set")
    snapshot_download("me/set", local_dir=tmp_path)
    files = hub.files("me/set")
    assert {path: (tmp_path / path).read_bytes() for path in files} == files
    assert set(HfApi().list_repo_files("me/set")) == files.keys()
    assert_same_function(
        TranscoderModel.from_pretrained(tmp_path, subfolder="layers.3.mlp.transcoder"), make_set(3).values()[0]
    )


def test_everything_is_as_before_afterwards(tmp_path):
    before = (constants.ENDPOINT, constants.HF_HUB_OFFLINE, constants.HF_HUB_CACHE, dict(os.environ), HfApi().endpoint)
    with local_hub(tmp_path) as hub:
        assert HfApi().whoami()["name"] == "me" and HfApi().endpoint == hub.url
        make_dictionary().push_to_hub("kept")
    after = (constants.ENDPOINT, constants.HF_HUB_OFFLINE, constants.HF_HUB_CACHE, dict(os.environ), HfApi().endpoint)
    assert after == before
    with local_hub(tmp_path):
        assert_same_function(make_dictionary(), TranscoderModel.from_pretrained("me/kept"))
        index = json.loads((tmp_path / "repos.json").read_text())
        assert list(index) == ["me/kept"]
