"""A server or a connection that dies: the push says so, nothing half is seen, and the next push ends right."""

import pytest
import torch
from huggingface_hub import constants, hf_hub_download

from hf_transcoders import TranscoderError, TranscoderModel, TranscoderSet
from hf_transcoders.testing.local_hub import Fault

from .conftest import assert_same_function, make_dictionary, make_set


def weights(hub, repo_id):
    return {path: content for path, content in hub.files(repo_id).items() if path.endswith(".safetensors")}


def test_connection_that_breaks_once_is_mended_by_the_client(hub, short_waits):
    model = make_dictionary()
    hub.faults.append(Fault("PUT", "/lfs/", after_bytes=1000))
    model.push_to_hub("me/x")
    assert [r.status for r in hub.requests if r.method == "PUT"] == [0, 200]
    assert_same_function(model, TranscoderModel.from_pretrained("me/x"))


@pytest.mark.parametrize("fault", [{"after_bytes": 1000}, {"status": 500}], ids=["connection lost", "server error"])
def test_upload_that_keeps_dying_is_one_sentence_and_can_be_repeated(hub, short_waits, fault):
    transcoders = make_set(3, 5)
    transcoders.push_to_hub("me/set")
    before, files = hub.log("me/set"), hub.files("me/set")
    with torch.no_grad():
        for dictionary in transcoders.values():
            dictionary.W_dec.mul_(2)
    hub.faults.append(Fault("PUT", "/lfs/", times=10**6, **fault))
    with pytest.raises(TranscoderError, match="push again, and files that arrived are not sent twice") as error:
        transcoders.push_to_hub("me/set")
    assert "\n" not in str(error.value)
    assert hub.log("me/set") == before and hub.files("me/set") == files
    hub.faults.clear()
    transcoders.push_to_hub("me/set")
    assert len(hub.log("me/set")) == len(before) + 1
    for name, loaded in TranscoderSet.from_pretrained("me/set").items():
        assert_same_function(transcoders[name], loaded)


def test_what_arrived_before_the_death_is_not_sent_twice(hub):
    transcoders = make_set(3, 5)
    # One of the two uploads fails, after the other has arrived.
    hub.faults.append(Fault("PUT", "/lfs/", status=501, delay=0.3))
    with pytest.raises(TranscoderError, match=r"failed in the middle of the push \(status 501\)"):
        transcoders.push_to_hub("me/set")
    assert hub.log("me/set") == ["initial commit"]
    hub.requests.clear()
    transcoders.push_to_hub("me/set")
    one, other = weights(hub, "me/set").values()
    assert len(one) == len(other) == hub.bytes_received("PUT", "/lfs/")


def test_death_between_upload_and_commit(hub):
    transcoders = make_set(3, 5)
    hub.faults.append(Fault("POST", "/commit/", after_bytes=10))
    with pytest.raises(TranscoderError, match="The connection to the Hub"):
        transcoders.push_to_hub("me/set")
    assert hub.log("me/set") == ["initial commit"]
    hub.requests.clear()
    transcoders.push_to_hub("me/set")
    assert hub.bytes_received("PUT", "/lfs/") == 0 and len(weights(hub, "me/set")) == 2


def test_server_that_dies_in_mid_upload_and_comes_back(hub, short_waits):
    model = make_dictionary()
    hub.faults.append(Fault("PUT", "/lfs/", stop=True))
    with pytest.raises(TranscoderError, match=r"The connection to the Hub at http://127.0.0.1:\d+ failed"):
        model.push_to_hub("me/x")
    with pytest.raises(TranscoderError, match="check the network"):
        model.push_to_hub("me/x")
    assert hub.log("me/x") == ["initial commit"]
    hub.start()
    model.push_to_hub("me/x")
    assert_same_function(model, TranscoderModel.from_pretrained("me/x"))


def test_somebody_else_pushes_at_the_same_moment(hub):
    model = make_dictionary()
    model.push_to_hub("me/x")
    with torch.no_grad():
        model.b_enc.add_(1)
    hub.faults.append(Fault("POST", "/commit/", status=412))
    with pytest.raises(TranscoderError, match="Somebody else pushed"):
        model.push_to_hub("me/x")


def test_slow_server(hub):
    model = make_dictionary()
    hub.faults.append(Fault("PUT", "/lfs/", delay=0.3))
    model.push_to_hub("me/x")
    assert_same_function(model, TranscoderModel.from_pretrained("me/x"))


def test_download_that_breaks_is_resumed_where_it_stopped(hub, short_waits, monkeypatch):
    # What the client writes down at a time: it resumes after the last of these.
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)
    model = make_dictionary(num_features=2048)
    model.push_to_hub("me/x")
    size = len(hub.files("me/x")["model.safetensors"])
    hub.requests.clear()
    hub.faults.append(Fault("GET", "/resolve/.*/model.safetensors", after_bytes=size // 2))
    assert_same_function(model, TranscoderModel.from_pretrained("me/x"))
    first, second = (r for r in hub.requests if r.method == "GET" and r.path.endswith("model.safetensors"))
    assert (first.status, second.status) == (200, 206)
    assert first.sent == size // 2 and size - first.sent <= second.sent < size - first.sent + 1000


def test_loading_again_asks_only_whether_there_is_something_new(hub):
    make_dictionary().push_to_hub("me/x")
    TranscoderModel.from_pretrained("me/x")
    hub.requests.clear()
    TranscoderModel.from_pretrained("me/x")
    assert not [r for r in hub.requests if r.method == "GET" and "/resolve/" in r.path]
    path = hf_hub_download("me/x", "config.json")
    assert path.startswith(constants.HF_HUB_CACHE)
