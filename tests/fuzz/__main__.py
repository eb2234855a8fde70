"""Damage files and see what the library says.

    python -m tests.fuzz --seed 1 --cases 10000
    python -m tests.fuzz --seed 1 --replay graph:17

Prints a table of outcomes and one case of every kind of fault; exits with 1 if there were faults.
"""

import argparse
import json
import shutil
import sys
import tempfile
import time
import traceback
from pathlib import Path

from tests import conftest  # noqa: F401  (no network, no bars)

from .outcomes import FAULTS, table


def parse(argv=None):
    parser = argparse.ArgumentParser(
        prog="python -m tests.fuzz", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--targets", help="only these, separated by commas")
    parser.add_argument("--output", type=Path, default=Path("runs/fuzz"), help="folder for records and failing cases")
    parser.add_argument(
        "--replay", metavar="TARGET:NUMBER", help="run one case in this process and show its traceback"
    )
    return parser.parse_args(argv)


def main(argv=None) -> int:
    args = parse(argv)
    from .runner import Fuzzer
    from .setup import quiet
    from .targets import TARGETS

    names = args.targets.split(",") if args.targets else list(TARGETS)
    with tempfile.TemporaryDirectory(prefix="fuzz-") as work, quiet(Path(work)):
        if args.replay:
            name, number = args.replay.split(":")
            return replay(Fuzzer(Path(work), args.seed, [name]), name, int(number), args.output)
        start = time.monotonic()
        fuzzer = Fuzzer(Path(work), args.seed, names)
        cases = fuzzer.cases(args.cases)
        records = fuzzer.run_all(
            cases,
            progress=lambda done: print(
                f"{done} of {len(cases)} after {time.monotonic() - start:.0f} s", file=sys.stderr
            ),
        )
        args.output.mkdir(parents=True, exist_ok=True)
        (args.output / "records.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        failed = [record for record in records if record["outcome"] in FAULTS]
        for record in failed:
            save(fuzzer, record["target"], record["number"], args.output)
        print(table(records))
        print(f"\n{len(records)} cases, {len(failed)} faults; seed {args.seed}; records in {args.output}")
    return 1 if failed else 0


def save(fuzzer, name, number, output) -> Path:
    """Copies the damaged files of a case to where they stay."""
    with fuzzer.damaged(name, number) as (_, sample, _):
        return Path(shutil.copytree(sample, output / f"{name}-{number}" / sample.name, dirs_exist_ok=True))


def replay(fuzzer, name, number, output) -> int:
    print(f"the damaged files are in {save(fuzzer, name, number, output)}")
    record = fuzzer.run(name, number)
    print(json.dumps(record, indent=2))
    target = fuzzer.targets[name]
    with fuzzer.damaged(name, number) as (place, sample, _):
        try:
            print(str(target.use(target.load(sample), place / "work"))[:1000])
        except BaseException:
            traceback.print_exc()
    return 1 if record["outcome"] in FAULTS else 0


if __name__ == "__main__":
    sys.exit(main())
