"""What an optimizer or a random number generator keeps comes back from a file with the same bits and types."""

import json
import math
import random

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from hf_transcoders import TranscoderError
from hf_transcoders.training.state_files import check_state, load_state, save_state


def same(a, b):
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.nan_to_num(7.5), b.nan_to_num(7.5))
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and (a == b).all()
    return type(a) is type(b) and (a == b or (a != a and b != b)) and str(a) == str(b)


def test_a_nested_state(tmp_path):
    values = torch.randn(3, 4)
    state = {
        "state": {
            0: {"step": torch.tensor(3.0), "exp_avg": values, "turned": values.T, "row": values[1], "again": values},
            7: {"codes": torch.arange(5, dtype=torch.uint8), "half": values.bfloat16(), "yes": torch.tensor([True])},
            8: {},
        },
        "param_groups": [{"betas": (0.9, 0.999), "lr": 1e-3, "fused": None, "params": [0, 7, 8]}, {"params": []}],
        "numbers": [0.1, 1e-310, -0.0, math.inf, -math.inf, math.nan, 2**80, True, "ü\n", ("dict", [])],
        ("a", 1): None,
        "nothing": torch.zeros(0, 3),
    }
    save_state(state, tmp_path / "x.safetensors")
    assert same(load_state(tmp_path / "x.safetensors"), state)


def test_random_number_generators(tmp_path):
    states = {"python": random.getstate(), "numpy": np.random.get_state(), "cpu": torch.get_rng_state()}
    save_state(states, tmp_path / "x.safetensors")
    found = load_state(tmp_path / "x.safetensors")
    assert same(found, states)
    expected = random.random(), np.random.rand(), torch.rand(1)
    random.setstate(found["python"])
    np.random.set_state(found["numpy"])
    torch.set_rng_state(found["cpu"])
    assert (random.random(), np.random.rand(), torch.rand(1)) == expected


@pytest.mark.parametrize("name", ["Adam", "AdamW", "SGD", "Adagrad", "RMSprop", "NAdam", "Adadelta", "ASGD", "Rprop"])
def test_optimizers_of_torch_continue_exactly(tmp_path, name):
    def steps(optimizer, parameters, count):
        for _ in range(count):
            for parameter in parameters:
                parameter.grad = torch.sin(parameter.detach() * 3)
            optimizer.step()

    def make():
        torch.manual_seed(0)
        parameters = [torch.nn.Parameter(torch.randn(4, 3)), torch.nn.Parameter(torch.randn(5))]
        options = {"momentum": 0.9} if name == "SGD" else {}
        groups = [{"params": parameters[:1]}, {"params": parameters[1:], "lr": 0.05}]
        return parameters, getattr(torch.optim, name)(groups, lr=0.01, **options)

    parameters, optimizer = make()
    steps(optimizer, parameters, 3)
    save_state(optimizer.state_dict(), tmp_path / "x.safetensors")
    others, other = make()
    for one, two in zip(others, parameters, strict=True):
        one.data.copy_(two.data)
    other.load_state_dict(load_state(tmp_path / "x.safetensors"))
    steps(optimizer, parameters, 3)
    steps(other, others, 3)
    assert all(torch.equal(one, two) for one, two in zip(others, parameters, strict=True))


def test_what_is_not_data_is_refused(tmp_path):
    class Odd:
        pass

    for value in (Odd(), {1, 2}, b"bytes", np.array([Odd()]), lambda: None):
        with pytest.raises(TranscoderError, match="cannot hold a"):
            check_state({"state": [value]})
        with pytest.raises(TranscoderError, match="cannot hold a"):
            save_state({"state": [value]}, tmp_path / "x.safetensors")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "header",
    ["", "[", "3", '"x"', "[]", '["value"]', '["value", [1]]', '["dict", [[1, 2]]]', '["dict", 3]', '["tensor", "9"]',
     '["array", "9"]', '["float", "x"]', '["float", [1]]', '["list", 5]', '["pickle", "x"]', '["dict", [[["list", []], ["value", 1]]]]',
     "[" * 100_000],
)  # fmt: skip
def test_a_damaged_file_is_one_sentence(tmp_path, header):
    save_file({"0": torch.ones(2)}, tmp_path / "x.safetensors", metadata={"state": header})
    with pytest.raises(TranscoderError) as error:
        load_state(tmp_path / "x.safetensors")
    assert "x.safetensors" in str(error.value) and "\n" not in str(error.value)


def test_other_files_are_one_sentence(tmp_path):
    with pytest.raises(TranscoderError, match="cannot be read"):
        load_state(tmp_path / "missing.safetensors")
    torch.save({"a": 1}, tmp_path / "x.safetensors")
    with pytest.raises(TranscoderError, match="cannot be read"):
        load_state(tmp_path / "x.safetensors")
    save_file({"0": torch.ones(2)}, tmp_path / "y.safetensors")
    with pytest.raises(TranscoderError, match="holds tensors but no state"):
        load_state(tmp_path / "y.safetensors")


def test_the_file_is_plain(tmp_path):
    save_state({"a": torch.ones(2), "b": 1}, tmp_path / "x.safetensors")
    assert list(load_file(tmp_path / "x.safetensors")) == ["0"]
    content = (tmp_path / "x.safetensors").read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    assert json.loads(header["__metadata__"]["state"])[0] == "dict"
