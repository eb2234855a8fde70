"""Sizes of batches, and refusals."""

import pytest

from hf_transcoders import TranscoderError
from hf_transcoders.circuits.patching import Patching
from hf_transcoders.circuits.patching.budget import Budget
from tests.circuits.patching.brute_force import tiny_task
from tests.tiny_models import tiny_model


def test_a_batch_size_counts_rows_times_prompts():
    budget = Budget(tiny_model("llama"), 12, batch_size=10)
    assert budget.rows(prompts=3, window=4) == 3
    assert budget.rows(prompts=20, window=4) == 1
    assert budget.prompts(window=4, parts=6, rows=100) == 10


def test_memory_bounds_rows_and_prompts():
    small, large = (Budget(tiny_model("llama"), 12, max_memory=memory) for memory in (10_000, 10_000_000))
    assert small.rows(1, 12) < large.rows(1, 12) and small.prompts(12, 6, 8) < large.prompts(12, 6, 8)
    # More tokens, prompts or recorded activations mean smaller batches.
    assert large.rows(1, 12) < large.rows(1, 1) and large.rows(4, 12) < large.rows(1, 12)
    assert large.prompts(12, 12, 1) < large.prompts(12, 6, 1)
    assert Budget(tiny_model("llama"), 12, max_memory=1).rows(5, 12) == 1


def test_a_batch_is_limited_in_one_way():
    model, task = tiny_model("llama"), tiny_task()
    with pytest.raises(TranscoderError, match="batch_size and max_memory both limit the batch: give one of them"):
        Patching(model, task, batch_size=4, max_memory=1 << 20)
    with pytest.raises(TranscoderError, match="batch_size is 0, but a batch has at least one row"):
        Patching(model, task, batch_size=0)
