import pytest
import torch

from hf_transcoders import TranscoderConfig, TranscoderModel, TranscoderSet
from hf_transcoders.testing import local_hub
from hf_transcoders.testing.local_hub import Account


WRITER, READER, STRANGER = "hf_writer", "hf_reader", "hf_stranger"
ACCOUNTS = {WRITER: Account("me"), READER: Account("me", can_write=False), STRANGER: Account("you")}


@pytest.fixture
def hub():
    """A Hub of its own for each test, with `huggingface_hub` logged in there as `me` and nothing in its cache."""
    with local_hub(token=WRITER, accounts=ACCOUNTS) as server:
        yield server


@pytest.fixture
def short_waits(monkeypatch):
    """The client waits seconds between its attempts to reach a server that fails: thousandths are enough here."""
    import time

    sleep = time.sleep
    monkeypatch.setattr(time, "sleep", lambda seconds: sleep(seconds / 1000))


def make_dictionary(seed=0, layer=3, num_features=64, **changes):
    torch.manual_seed(seed)
    config = TranscoderConfig(
        d_in=16,
        num_features=num_features,
        k=4,
        input_site=f"layers.{layer}.mlp.in",
        output_site=f"layers.{layer}.mlp.branch",
        base_model_name_or_path="some/base",
        **changes,
    )
    model = TranscoderModel(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    return model.eval()


def make_set(*layers):
    return TranscoderSet([make_dictionary(seed=layer, layer=layer) for layer in layers])


def assert_same_function(ours, theirs):
    """Equal parameters, and equal outputs bit for bit."""
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    for name, value in ours.state_dict().items():
        assert torch.equal(value, theirs.state_dict()[name]), name
    inputs = torch.randn(7, ours.config.d_in, generator=torch.Generator().manual_seed(0))
    assert torch.equal(ours(inputs).reconstruction, theirs(inputs).reconstruction)
