"""Data-parallel training with two real processes (gloo, CPU)."""

import json
import os
import subprocess
import sys
from pathlib import Path

from hf_transcoders import TranscoderSet


def test_two_processes_agree_and_read_different_text(tmp_path):
    root = Path(__file__).parent.parent.parent
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += ["-m", "tests.training.two_processes", str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr[-3000:]
    ranks = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1)]
    for shared in ("weights", "target_variance", "dead", "logs"):
        assert ranks[0][shared] == ranks[1][shared], shared
    # Ten batches of 32 come from the first 384 of the 576 activations that a process has in an epoch: none comes twice.
    assert not set(ranks[0]["epoch"]) & set(ranks[1]["epoch"])
    assert ranks[0]["logs"][0]["tokens"] == 10 * 2 * 32
    saved = TranscoderSet.from_pretrained(tmp_path / "checkpoint-20")
    for name, value in saved.named_parameters():
        assert value.double().sum().item() == ranks[0]["weights"][name]
