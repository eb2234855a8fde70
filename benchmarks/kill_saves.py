"""
Kill `save_pretrained` of a dictionary, a set and a graph with SIGKILL at random moments, while another process reads.

```
python benchmarks/kill_saves.py --kills 200
```

A read is mixed when configuration and weights, dictionaries of a set, or files of a graph come from different saves. After
the last kill one more save runs; files that then do not belong in or next to the folder count as left over.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path


ROOT = Path(__file__).resolve().parent.parent


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200, help="of each kind")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TRANSFORMERS_VERBOSITY": "error", "OMP_NUM_THREADS": "1"}
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "tests.models.killed_saves", folder, str(options.kills), str(options.seed)]
        result = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    columns = json.loads(result.stdout.splitlines()[-1])
    print(f"{'':12}" + "".join(f"{name:>10}" for name in next(iter(columns.values()))))
    for kind, counts in columns.items():
        print(f"{kind:12}" + "".join(f"{count:10,}" for count in counts.values()))
    print(f"{time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
