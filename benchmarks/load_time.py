"""Time to load a 1 GB dictionary from a warm page cache, each load in a fresh process.

Tensors are mapped from their file. In one file they begin at multiples of 64 bytes, where torch would put them; in the other
they do not, and are copied so that products have the same bits as before saving.

    python benchmarks/load_time.py                              # this version
    python benchmarks/load_time.py --also ../other-checkout     # and another one, in turn
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from safetensors.torch import load_file, save_file

from hf_transcoders import TranscoderConfig, TranscoderModel


HERE = Path(__file__).parents[1]
LOAD = """
import sys, time
from hf_transcoders import TranscoderModel
start = time.perf_counter()
TranscoderModel.from_pretrained(sys.argv[1])
print(time.perf_counter() - start)
"""


def save(folder: Path, gigabytes: float, aligned: bool) -> None:
    """Saves a dictionary whose tensors begin at multiples of 64 bytes in the file, or do not."""
    width = 2048
    features = int(gigabytes * 2**30 / (2 * 4 * width))
    TranscoderModel(TranscoderConfig(d_in=width, num_features=features, k=64)).save_pretrained(folder)
    path = folder / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    for padding in range(0, 64, 8):
        save_file(tensors, path, {"format": "pt", "padding": "x" * padding})
        with open(path, "rb") as file:
            begin = 8 + int.from_bytes(file.read(8), "little")
        if (begin % 64 == 0) == aligned:
            return


def load_time(folder: Path, package: Path) -> float:
    environment = {**os.environ, "PYTHONPATH": str(package), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", LOAD, str(folder)]
    done = subprocess.run(command, env=environment, cwd=package, capture_output=True, text=True, check=True)
    return float(done.stdout)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--also", type=Path, action="append", default=[], help="another checkout to measure in turn")
    parser.add_argument("--gigabytes", type=float, default=1.0, help="size of the weights")
    parser.add_argument("--repeats", type=int, default=5, help="loads of each file by each version")
    args = parser.parse_args()
    results = {}
    for aligned in (True, False):
        with tempfile.TemporaryDirectory() as folder:
            save(Path(folder), args.gigabytes, aligned)
            times = {str(package): [] for package in (HERE, *args.also)}
            # In turn, so that other work on the machine disturbs all of them alike; the first round warms the cache.
            for number in range(args.repeats + 1):
                for package in times:
                    seconds = load_time(Path(folder), Path(package))
                    if number:
                        times[package].append(seconds)
        name = "aligned" if aligned else "unaligned"
        results[name] = {package: sorted(round(s, 3) for s in seconds) for package, seconds in times.items()}
        for package, seconds in times.items():
            print(
                f"{name:9} {Path(package).name:20} median {statistics.median(seconds):.3f} s, best {min(seconds):.3f} s"
            )
    print(json.dumps(results))


if __name__ == "__main__":
    main()
