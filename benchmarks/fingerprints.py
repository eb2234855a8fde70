"""
Measure the cost of the fingerprints that guard caches and resumes.

```
python benchmarks/fingerprints.py
```

Digests of a base model's weights and of rows of tokens, taken once when a run starts, and SHA-256 of a checkpoint, taken when it
is written and when it is resumed.
"""

import argparse
import tempfile
import time
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from hf_transcoders.data.row_facts import scan_rows
from hf_transcoders.lm.model_fingerprint import model_facts
from hf_transcoders.training.checkpoint_files import commit, why_unusable


def best(function, rounds: int) -> float:
    """Processor time of the fastest call, which is steadier than wall time on a shared machine."""
    times = []
    for _ in range(rounds):
        start = time.process_time()
        function()
        times.append(time.process_time() - start)
    return min(times)


def weights(rounds: int) -> None:
    config = LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    size = sum(parameter.nbytes for parameter in model.parameters()) / 1e9
    seconds = best(lambda: model_facts(model), rounds)
    print(f"base model     {size:.2f} GB in {seconds:.3f} s: {size / seconds:.1f} GB/s")


def rows(count: int, rounds: int) -> None:
    ids = np.random.default_rng(0).integers(3, 49152, count * 128, dtype=np.int32)
    offsets = np.arange(0, count * 128 + 1, 128, dtype=np.int32)
    dataset = datasets.Dataset(pa.table({"input_ids": pa.ListArray.from_arrays(offsets, ids)}))
    few = count // 10
    as_list = [{"input_ids": row} for row in ids[: few * 128].reshape(-1, 128).tolist()]
    for name, data in (("dataset", dataset), ("shuffled", dataset.shuffle(seed=0)), ("list", as_list)):
        seconds = best(lambda data=data: scan_rows(data, 1, [0, 1, 2]), rounds if name == "dataset" else 1)
        print(f"rows, {name:<9}{len(data):,} of 128 tokens in {seconds:.2f} s: {len(data) / seconds:,.0f} rows/s")


def checkpoint(rounds: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        partial, final = Path(folder, "partial"), Path(folder, "checkpoint-1")
        partial.mkdir()
        for name in ("model", "optimizer"):
            save_file({"x": torch.randn(64 << 20)}, partial / f"{name}.safetensors")
        seconds = best(lambda: commit(partial, final), 1)
        print(f"checkpoint     of 0.54 GB committed in {seconds:.2f} s: {0.537 / seconds:.1f} GB/s")
        for name in ("fingerprint.json", "scheduler.safetensors", "trainer_state.json"):
            (final / name).write_text("{}")
        again = Path(folder, "again")
        final.rename(again)
        (again / "checkpoint.json").unlink()
        commit(again, final)
        seconds = best(lambda: why_unusable(final), rounds)
        assert why_unusable(final) is None
        print(f"               checked on resuming in {seconds:.2f} s: {0.537 / seconds:.1f} GB/s")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rows", type=int, default=1_000_000)
    options = parser.parse_args()
    datasets.disable_progress_bars()
    torch.set_num_threads(1)
    weights(options.rounds)
    rows(options.rows, options.rounds)
    checkpoint(options.rounds)
