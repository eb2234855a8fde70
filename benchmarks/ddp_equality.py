"""Compare a run on two processes with one on a single process and twice the batch size (gloo, CPU; a tiny language model).

    python benchmarks/ddp_equality.py              # a few seconds per row
    python benchmarks/ddp_equality.py --steps 200

Prints the largest absolute difference of any weight after the given number of Adam steps and of any logged metric, and whether the
tokens since each feature last fired are equal. Only the order in which numbers are added differs.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from safetensors.torch import load_file


ROOT = Path(__file__).parent.parent


def launch(folder, name, processes, options):
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command += ["-m", "tests.training.two_processes", folder, json.dumps({name: options})]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, check=True, capture_output=True)
    return load_file(Path(folder, name, "weights_0.safetensors")), json.loads(
        Path(folder, name, "facts_0.json").read_text()
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40)
    args = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    from tests.training.two_processes import EQUAL_KINDS as kinds

    shared = {"kinds": kinds, "max_steps": args.steps, "save_steps": args.steps}
    with tempfile.TemporaryDirectory() as folder:
        runs = {
            "one": launch(folder, "one", 1, shared),
            "DDP": launch(folder, "ddp", 2, shared),
            "FSDP": launch(folder, "fsdp", 2, {**shared, "fsdp": True}),
        }
    weights, facts = runs.pop("one")
    print(f"after {args.steps} steps{'':10}{'weights':>12}{'relative, logs':>16}  counts of silent features")
    for name, (others, other_facts) in runs.items():
        for kind in kinds:
            own = [key for key in weights if key.split(".")[1] == kind]
            difference = max((weights[key] - others[key]).abs().max().item() for key in own)
            logged = max(
                abs(log[key] - other[key]) / max(abs(log[key]), 1e-6)
                for log, other in zip(facts["logs"], other_facts["logs"], strict=True)
                for key in log
                if key.startswith(f"{kind}/")
            )
            same = "the same" if facts["dead"][kind] == other_facts["dead"][kind] else "DIFFERENT"
            print(f"{name:6}{kind:18}{difference:>12.2g}{logged:>16.2g}  {same}")


if __name__ == "__main__":
    main()
