"""A run that is killed at random moments ends in the bits of the run that was left alone."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the attempts are forks of one process")
def test_a_killed_run_ends_as_if_it_had_not_been(tmp_path):
    """Weights, optimizer, dead features, thresholds, random numbers and logs; in blocks, in saves and between them."""
    root = Path(__file__).parent.parent.parent
    command = [sys.executable, "-m", "tests.training.killed_run", str(tmp_path), "10"]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
    tally = json.loads(result.stdout.splitlines()[-1])
    assert tally["differences"] == []
    assert tally["kills"] == tally["survived"] == 10
    # The undisturbed run had something to lose.
    last = tmp_path / "straight" / "checkpoint-60"
    logs = json.loads((last / "trainer_state.json").read_text())["log_history"]
    assert any(log.get("topk/dead_fraction", 0) > 0 and log.get("topk/auxk_loss", 0) > 0 for log in logs)
