"""Memory and time to load a 2 GB set of transcoders, one layer of it, and to list it, in each format that is written here.

Every measurement is a fresh process. Memory is the peak resident memory (`VmHWM`) above that of a process that has imported the
package, mapped files included.

    python benchmarks/load_set.py
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from hf_transcoders import TranscoderConfig, TranscoderModel, TranscoderSet
from hf_transcoders.cli import main as cli


WIDTH = 1024
# Formats of transcoders, with an activation that they have.
FORMATS = {"native": "relu", "circuit-tracer": "relu", "saelens": "relu", "sparsify": "topk"}
MEASURED = """
import contextlib, io, json, sys, time
import hf_transcoders
from hf_transcoders import TranscoderModel, TranscoderSet
from hf_transcoders.cli import main

def resident(name):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name)) * 1024

what, folder = sys.argv[1], sys.argv[2]
if what == "info":
    from hf_transcoders.cli import info  # The imports of the command are not part of its work.
before = resident("VmRSS")
start = time.perf_counter()
if what == "info":
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert main(["info", "--transcoders", folder, "--json"]) == 0
    assert len(json.loads(out.getvalue())) > 1
else:
    found = TranscoderSet.from_pretrained(folder, **({"layers": 3} if what == "one layer" else {}))
    # Every weight is read once, as by a first forward pass.
    sum(float(p.sum()) for p in found.parameters())
print(json.dumps({"seconds": time.perf_counter() - start, "peak": resident("VmHWM") - before}))
"""


def write(folder: Path, gigabytes: float, layers: int, activation: str) -> None:
    features = int(gigabytes * 1e9 / (layers * 2 * 4 * WIDTH))
    torch.manual_seed(0)
    models = {}
    for layer in range(layers):
        config = TranscoderConfig(
            d_in=WIDTH, num_features=features, activation=activation, base_model_name_or_path="owner/model",
            base_model_type="llama", input_site=f"layers.{layer}.mlp.in", output_site=f"layers.{layer}.mlp.out",
        )  # fmt: skip
        models[f"layers.{layer}.mlp.transcoder"] = TranscoderModel(config)
    TranscoderSet(models).save_pretrained(folder)


def measure(what: str, folder: Path) -> dict[str, float]:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", MEASURED, what, str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{what} of {folder.name} failed: {done.stderr[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def command_seconds(folder: Path) -> float:
    """Wall time of the whole command, the start of Python included."""
    code = (
        "import subprocess, sys, time; s = time.perf_counter();"
        "subprocess.run([sys.executable, '-m', 'hf_transcoders', 'info', '--transcoders', sys.argv[1]], check=True,"
        " stdout=subprocess.DEVNULL); print(time.perf_counter() - s)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=True)
    return float(done.stdout)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=2.0, help="size of the weights of the set")
    parser.add_argument("--layers", type=int, default=16, help="layers of the set")
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=FORMATS, help="formats to measure")
    parser.add_argument("--folder", help="folder for the files, by default a temporary one")
    args = parser.parse_args()
    print(f"{'format':20} {'size':>9} {'set':>17} {'one layer':>17} {'info':>17} {'command':>8}")
    with tempfile.TemporaryDirectory(dir=args.folder) as place:
        for name in args.formats:
            native, folder = Path(place, "native"), Path(place, name)
            write(native, args.gigabytes, args.layers, FORMATS[name])
            if name != "native" and cli(["convert", str(native), str(folder), "--to", name]):
                raise SystemExit(f"The set was not converted to {name}.")
            size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
            cells = [
                f"{one['peak'] / 1e6:6.0f} MB {one['seconds']:5.2f} s"
                for one in (measure(what, folder) for what in ("set", "one layer", "info"))
            ]
            print(
                f"{name:20} {size / 1e6:6.0f} MB {' '.join(f'{c:>17}' for c in cells)} {command_seconds(folder):6.2f} s"
            )
            if name != "native":
                shutil.rmtree(folder)


if __name__ == "__main__":
    main()
