"""Run the tests on many machines in one: threads, instruction sets, and versions of what the package builds on.

    python -m tests.matrix                        every row, the whole suite: hours
    python -m tests.matrix --rows avx2 lowest     some rows
    python -m tests.matrix --list
    python -m tests.matrix --rows newest -- tests/lm tests/models -k "not real_model"

What stands after `--` goes to pytest. Versions are tried in environments of their own, below `.venv-matrix`, which are
made on first use. A table of verdicts comes last; the exit code is 1 if any row failed.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
import tomllib
from dataclasses import dataclass, field
from pathlib import Path


ROOT = Path(__file__).parent.parent
ENVIRONMENTS = ROOT / ".venv-matrix"
# Whose versions are tried; what they need themselves may be any version that fits.
_VARIED = ("transformers", "huggingface_hub", "datasets")
# Newer minor versions of Python, the newest first.
_PYTHONS = [f"3.{minor}" for minor in range(15, sys.version_info.minor, -1)]


@dataclass
class Row:
    """One setting.

    Args:
        what (`str`): The setting in words.
        variables (`dict[str, str]`): Environment variables.
        threads (`int`): Threads of the tests' own process, and of those that it starts.
        versions (`str`): `""` for the environment at hand, else which versions an environment has.
        python (`str`): Its Python.
    """

    what: str
    variables: dict[str, str] = field(default_factory=dict)
    threads: int = 1
    versions: str = ""
    python: str = sys.executable


def rows() -> dict[str, Row]:
    found = {
        "one-thread": Row("1 thread, the best instructions of this processor"),
        "two-threads": Row("2 threads", threads=2),
        "default": Row("instructions of every x86-64", {"ATEN_CPU_CAPABILITY": "default"}),
        "avx2": Row("AVX2", {"ATEN_CPU_CAPABILITY": "avx2"}),
        "onednn-sse41": Row(
            "oneDNN with SSE4.1, MKL with one code path for all",
            {"ONEDNN_MAX_CPU_ISA": "SSE41", "MKL_CBWR": "COMPATIBLE"},
        ),
        "onednn-avx2": Row("oneDNN and MKL with AVX2", {"ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_CBWR": "AVX2"}, threads=2),
        "lowest": Row("lowest versions that pyproject.toml allows", versions="lowest"),
        "newest": Row("newest versions that the index has", versions="newest"),
    }
    newer = newer_python()
    if newer is not None:
        found["newer-python"] = Row(f"Python {newer[0]}, newest versions", versions="newest", python=newer[1])
    return found


def newer_python() -> tuple[str, str] | None:
    """Version and path of the newest Python on this machine that is newer than the one at hand."""
    for version in _PYTHONS:
        places = [
            shutil.which(f"python{version}"),
            *sorted(Path.home().glob(f".pyenv/versions/{version}.*/bin/python")),
        ]
        for path in filter(None, places):
            if subprocess.run([path, "-c", "import ensurepip"], capture_output=True).returncode == 0:
                return version, str(path)
    return None


def constraints(versions: str) -> list[str]:
    """Exact versions of what is varied; torch as in constraints.txt, or an install may fetch gigabytes of CUDA libraries."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [line for line in lines if line.startswith("torch==")]
    requirements = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    for name in _VARIED:
        (requirement,) = (line for line in requirements if re.match(rf"{name}\b", line))
        lowest = re.search(r">=([\d.]+)", requirement)[1]
        pins.append(f"{name}=={lowest if versions == 'lowest' else newest(requirement)}")
    return pins


def newest(requirement: str) -> str:
    """The newest version that the index has and the requirement allows."""
    name = re.match(r"[\w-]+", requirement)[0]
    command = [sys.executable, "-m", "pip", "index", "versions", name]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    versions = re.search(r"Available versions: (.*)", result.stdout)[1].split(", ")
    below = re.search(r"<(\d+)", requirement)
    return next(v for v in versions if below is None or int(v.split(".")[0]) < int(below[1]))


def environment(row: Row) -> tuple[Path, str]:
    """The Python of a row, and the versions that it has; its environment is made where it is missing."""
    if not row.versions:
        return Path(sys.executable), ""
    pins = constraints(row.versions)
    tag = subprocess.run(
        [row.python, "-c", "import sys; print(*sys.version_info[:2], sep='.')"], capture_output=True, text=True
    )
    folder = ENVIRONMENTS / f"{row.versions}-{tag.stdout.strip()}"
    python, stamp = folder / "bin" / "python", folder / "constraints.txt"
    if not stamp.exists() or stamp.read_text().splitlines() != pins:
        shutil.rmtree(folder, ignore_errors=True)
        subprocess.run([row.python, "-m", "venv", folder], check=True)
        wanted = folder / "wanted.txt"
        wanted.write_text("\n".join(pins) + "\n")
        install = [python, "-m", "pip", "install", "--quiet", "--constraint", wanted, "--editable", f"{ROOT}[dev]"]
        subprocess.run(install, check=True)
        wanted.rename(stamp)
    return python, ", ".join(pin for pin in pins if not pin.startswith("torch"))


def run(name: str, row: Row, arguments: list[str], logs: Path) -> tuple[bool, str, float]:
    """Whether the tests pass in a row, their last line, and the seconds they took."""
    start = time.monotonic()
    log = logs / f"{name}.log"
    try:
        python, _ = environment(row)
    except (subprocess.CalledProcessError, OSError, StopIteration, TypeError) as error:
        return False, f"its environment cannot be made: {error}", time.monotonic() - start
    variables = {**os.environ, **row.variables, "OMP_NUM_THREADS": str(row.threads), "PYTHONPATH": str(ROOT)}
    command = [python, "-m", "pytest", "--threads", str(row.threads), *arguments]
    with open(log, "w") as file:
        code = subprocess.run(command, cwd=ROOT, env=variables, stdout=file, stderr=subprocess.STDOUT).returncode
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    last = "passed" if code == 0 else f"{len(failed)} failed: {log}" if failed else f"exit {code}: {log}"
    return code == 0, last, time.monotonic() - start


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    ours, theirs = (argv[: argv.index("--")], argv[argv.index("--") + 1 :]) if "--" in argv else (argv, [])
    table = rows()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--rows", nargs="+", choices=list(table), default=list(table), metavar="ROW", help="only these"
    )
    parser.add_argument("--list", action="store_true", help="say what rows there are")
    parser.add_argument("--logs", type=Path, default=ROOT / "runs" / "matrix", help="folder for pytest's output")
    args = parser.parse_args(ours)
    if args.list:
        print("\n".join(f"{name:14}{row.what}" for name, row in table.items()))
        return 0
    args.logs.mkdir(parents=True, exist_ok=True)
    verdicts = {}
    for name in args.rows:
        print(f"{name}: {table[name].what} ...", flush=True)
        verdicts[name] = run(name, table[name], theirs, args.logs)
    print(f"\n{'row':14}{'verdict':9}{'minutes':>8}  ")
    for name, (passed, last, seconds) in verdicts.items():
        print(f"{name:14}{'green' if passed else 'RED':9}{seconds / 60:8.1f}  {'' if passed else last}")
    if "newer-python" not in table:
        print(f"{'newer-python':14}not run: this machine has no Python newer than 3.{sys.version_info.minor}")
    return 0 if all(passed for passed, _, _ in verdicts.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
