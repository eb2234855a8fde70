import pytest

from hf_transcoders.ops import dispatch, sparse

from .kernel_cases import DEVICE


@pytest.fixture
def kernels(monkeypatch):
    """Kernels on the device of the tests, with gathered rows whatever the share of active features, and fused selection."""
    monkeypatch.delenv("HF_TRANSCODERS_KERNELS", raising=False)
    monkeypatch.setattr(dispatch, "_KERNEL_DEVICES", (DEVICE,))
    monkeypatch.setattr(dispatch, "_DENSE_BELOW", 0)
    monkeypatch.setattr(dispatch, "_DENSE_BELOW_FP32", 0)
    monkeypatch.setattr(sparse, "on_tensor_cores", lambda dtype: True)
