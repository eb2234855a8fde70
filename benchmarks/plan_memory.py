"""Compare the peak memory estimated by `hf-transcoders plan` with the peak of real runs (CPU).

    python benchmarks/plan_memory.py                 # SmolLM2-135M-Instruct, which comes as a package
    python benchmarks/plan_memory.py --model path

Each run is `hf-transcoders train` in its own process, whose peak resident memory is read from Linux (`VmHWM`).
"""

import argparse
import json
import subprocess
import sys
import tempfile


RUNS = {
    "topk, one layer": ["--layers", "4", "--num_features", "4608", "--k", "64"],
    "topk, three layers": ["--layers", "2", "3", "4", "--num_features", "16384", "--k", "32"],
    "relu, one layer": ["--layers", "4", "--num_features", "16384", "--activation", "relu", "--l1_coefficient", "0.01"],
    "jumprelu, large batch": [
        "--layers", "4", "--num_features", "8192", "--activation", "jumprelu", "--l0_coefficient", "0.01",
        "--per_device_train_batch_size", "4096",
    ],
}  # fmt: skip
SHARED = [
    "--use_cpu", "--dtype", "float32", "--buffer_tokens", "4096", "--max_tokens", "8192", "--initialization_tokens", "2048",
    "--eval_tokens", "512", "--eval_loss_tokens", "512", "--documents", "200", "--report_to", "none", "--logging_steps", "1",
    "--dead_after_tokens", "100000000",
]  # fmt: skip
TRAIN = """
import sys
from hf_transcoders.cli import main
assert main(sys.argv[1:]) == 0
print(*(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")), file=sys.stderr)
"""


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    rows = {}
    if not args.json:
        print(f"{'run':24}{'planned GiB':>12}{'measured GiB':>14}{'ratio':>8}  largest phase")
    for name, options in RUNS.items():
        options = ["--model", args.model, *SHARED, *options]
        command = [sys.executable, "-m", "hf_transcoders", "plan", *options, "--tflops", "1", "--json"]
        plan = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        with tempfile.TemporaryDirectory() as output:
            command = [sys.executable, "-c", TRAIN, "train", *options, "--output_dir", output, "--json"]
            run = subprocess.run(command, capture_output=True, text=True, check=True)
        measured = int(run.stderr.split()[-1]) * 1024
        row = rows[name] = {
            "planned GiB": plan["peak"]["ddp"] / 2**30,
            "measured GiB": measured / 2**30,
            "planned / measured": plan["peak"]["ddp"] / measured,
            "largest phase": max(plan["phases"], key=plan["phases"].get),
        }
        if not args.json:
            print(
                f"{name:24}{row['planned GiB']:>12.2f}{row['measured GiB']:>14.2f}{row['planned / measured']:>8.2f}"
                f"  {row['largest phase']}",
                flush=True,
            )
    if args.json:
        print(json.dumps(rows, indent=2))


if __name__ == "__main__":
    main()
