"""Activations from the cache are those that a harvester without one gives; what has not changed is served."""

import copy

import datasets
import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from hf_transcoders.data import ActivationHarvester
from tests.data.test_harvest import SITES, token_rows
from tests.tiny_models import tiny_model


ROWS = token_rows(12)


@pytest.fixture(scope="module")
def llama():
    return tiny_model("llama")


def make(model, rows, cache=None, **changes):
    changes = {"rows_per_chunk": 4, "outlier_factor": None, **changes}
    return ActivationHarvester(model, rows, SITES, cache_dir=cache, **changes)


def configured(model, **changes):
    config = copy.deepcopy(model.config)
    for name, value in changes.items():
        setattr(config, name, value)
    other = LlamaForCausalLM(config).eval()
    other.load_state_dict(model.state_dict())
    return other


def ablated(model):
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.model.layers[0].self_attn.o_proj.weight[:, 8:16] = 0
    return other


def one_weight(model):
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.model.layers[0].mlp.down_proj.weight[3, 3] += 0.5
    return other


def with_adapter(model):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    other = copy.deepcopy(model)
    other.add_adapter(peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    return other.eval()


def other_row(rows):
    changed = [dict(row) for row in rows]
    changed[5] = {"input_ids": [9] * 10}
    return changed


def masked_row(rows):
    changed = [{**row, "attention_mask": [1] * 10} for row in rows]
    changed[5]["attention_mask"] = [1] * 4 + [0] * 6
    return changed


@pytest.mark.parametrize(
    "change",
    [
        lambda model, rows: (ablated(model), rows, {}),
        lambda model, rows: (one_weight(model), rows, {}),
        lambda model, rows: (with_adapter(model), rows, {}),
        lambda model, rows: (configured(model, rms_norm_eps=1.0), rows, {}),
        lambda model, rows: (
            configured(model, rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}), rows, {}
        ),
        lambda model, rows: (model, other_row(rows), {}),
        lambda model, rows: (model, masked_row(rows), {}),
        lambda model, rows: (model, rows[::-1], {}),
        lambda model, rows: (model, datasets.Dataset.from_list(rows).shuffle(seed=1), {}),
        lambda model, rows: (model, datasets.Dataset.from_list(other_row(rows)), {}),
        lambda model, rows: (model, rows, {"rows_per_chunk": 3}),
        lambda model, rows: (model, rows, {"outlier_factor": 1.1}),
        lambda model, rows: (model, rows, {"special_token_ids": [ROWS[0]["input_ids"][4]]}),
        lambda model, rows: (model, rows, {"autocast": lambda: torch.autocast("cpu", torch.bfloat16)}),
        lambda model, rows: (model, rows, {"dtype": torch.bfloat16}),
        lambda model, rows: (model, rows, {"seed": 1}),
    ],
)  # fmt: skip
def test_what_changes_the_numbers_changes_the_key(llama, tmp_path, change):
    cached = make(llama, ROWS, tmp_path)
    chunks = [cached.chunk(number) for number in range(cached.num_chunks)]
    model, rows, changes = change(llama, ROWS)
    got, expected = make(model, rows, tmp_path, **changes), make(model, rows, **changes)
    differ = False
    for number in range(expected.num_chunks):
        one, other = got.chunk(number), expected.chunk(number)
        assert all(torch.equal(one[site], other[site]) for site in SITES)
        differ |= number >= len(chunks) or any(not torch.equal(one[site], chunks[number][site]) for site in SITES)
    assert differ  # The change was one.


@pytest.mark.parametrize(
    "change",
    [
        lambda model, rows: (copy.deepcopy(model), rows),
        lambda model, rows: (copy.deepcopy(model).train(), rows),
        lambda model, rows: (copy.deepcopy(model).requires_grad_(False), rows),
        lambda model, rows: (model, [{"input_ids": np.array(row["input_ids"])} for row in rows]),
        lambda model, rows: (model, [{**row, "attention_mask": [1] * 10, "labels": [1] * 10} for row in rows]),
        lambda model, rows: (model, datasets.Dataset.from_list(rows)),
        lambda model, rows: (model, datasets.Dataset.from_list(rows).with_format("torch")),
        lambda model, rows: (model, datasets.Dataset.from_list(rows[::-1]).select(range(11, -1, -1))),
    ],
)
def test_what_is_the_same_is_served(llama, tmp_path, change):
    make(llama, ROWS, tmp_path).chunk(0)
    (folder,) = tmp_path.iterdir()
    make(*change(llama, ROWS), tmp_path).chunk(0)
    assert list(tmp_path.iterdir()) == [folder] and len(list(folder.iterdir())) == 1
