"""Devices of models whose parameters do not show them."""

from types import SimpleNamespace

import pytest
import torch
from accelerate import cpu_offload

from hf_transcoders import TranscoderError
from hf_transcoders.lm.devices import check_one_device, input_device, module_device, moved
from hf_transcoders.lm.heads import value_weight
from tests.tiny_models import tiny_model


CPU = torch.device("cpu")


def offloaded():
    return cpu_offload(tiny_model("llama"), execution_device=CPU)


def test_an_offloaded_model_takes_inputs_where_it_computes():
    model = offloaded()
    assert model.device.type == "meta"
    assert input_device(model) == CPU and module_device(model.model.norm) == CPU
    assert input_device(tiny_model("llama")) == CPU and module_device(torch.nn.ReLU()) == CPU
    # A module may have several hooks.
    model.model.embed_tokens._hf_hook = SimpleNamespace(
        hooks=[SimpleNamespace(), SimpleNamespace(execution_device="cuda:1")]
    )
    assert input_device(model) == torch.device("cuda:1")


def test_only_a_model_without_a_place_is_moved():
    model = offloaded()
    assert moved(model, "meta") is model and input_device(model) == CPU
    plain = tiny_model("llama")
    assert moved(plain, "meta").device.type == "meta"
    quantized = tiny_model("llama")
    quantized.is_quantized = True
    assert moved(quantized, "meta").device == CPU


def test_a_split_model_is_refused_where_layers_meet():
    model = offloaded()
    model.hf_device_map = {"model.layers.0": "cpu", "model.layers.1": "disk"}
    check_one_device(model)
    model.model.layers[1].self_attn.q_proj._hf_hook.execution_device = "cuda:1"
    with pytest.raises(TranscoderError, match="split over cpu, cuda:1.*load it on one device"):
        check_one_device(model)
    with pytest.raises(TranscoderError, match="split over"):
        value_weight(model, 0)
