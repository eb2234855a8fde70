"""Runs cases in forked processes that are watched and limited."""

import contextlib
import ctypes
import faulthandler
import functools
import json
import math
import os
import random
import resource
import select
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch

from .outcomes import Hang, count_not_finite, digest, is_memory, is_refusal, messages, place_of, speaks_of_nan
from .targets import TARGETS


# Processor time of a case, in seconds; no sample takes a fifth of it. After three times as much the process is killed.
_CPU_SECONDS = 6.0
# Address space that a case may add, and resident memory beyond twice the files: what libraries take when first called.
_ADDRESS_SPACE, _MEMORY = 3 << 30, 256 << 20
# Cases of one process: what libraries keep in memory goes with it.
_CASES_PER_PROCESS = 400

_IN_MODIFY, _IN_CREATE, _IN_DELETE, _IN_OPEN, _IN_ISDIR = 0x2, 0x100, 0x200, 0x20, 0x40000000


class Fuzzer:
    """Samples, what they give when they are whole, and a folder in which cases run.

    Args:
        work (`Path`): The folder.
        seed (`int`): Decides every case: case 12 of a target is the same in every run.
        names (`Iterable[str]`, *optional*): Targets. All by default.
    """

    def __init__(self, work: Path, seed: int, names: Iterable[str] = TARGETS):
        self.work, self.seed = Path(work), seed
        self.targets = {name: TARGETS[name] for name in names}
        self.whole: dict[tuple[str, str], tuple[str, int]] = {}
        for name, target in self.targets.items():
            folder = self.work / "samples" / name
            folder.mkdir(parents=True)
            target.make(folder)
            for sample in sorted(folder.iterdir()):
                record = self.run(name, 0, sample.name)
                if record["outcome"] not in ("equal", "changed"):
                    raise AssertionError(f"the sample {name}/{sample.name} does not work: {record}")
                self.whole[name, sample.name] = record["digest"], record["not_finite"]

    def cases(self, count: int) -> list[tuple[str, int]]:
        """At least `count` targets and numbers, by the targets' weights, in an order that mixes them."""
        total = sum(target.weight for target in self.targets.values())
        cases = [
            (name, number)
            for name, target in self.targets.items()
            for number in range(math.ceil(count * target.weight / total))
        ]
        random.Random(self.seed).shuffle(cases)
        return cases

    # ------------------------------------------------------------------------------------------------ one case

    def run(self, name: str, number: int, whole: str | None = None) -> dict:
        """Run one case in this process.

        Args:
            name (`str`), number (`int`): The case.
            whole (`str`, *optional*): Name of a sample that is to be read as it is.
        """
        with self.damaged(name, number, whole) as (place, sample, what):
            target = self.targets[name]
            record = {"target": name, "number": number, "what": what}
            before = _files(place)
            with _temporary(place / "tmp"), _opened(sample.with_name("outside")) as opened:
                record |= self._read(target, sample, place / "work", self.whole.get((name, sample.name)))
            if opened and record["outcome"] != "hang":
                record |= {"outcome": "outside", "error": f"opened or changed: {', '.join(sorted(opened))}"}
            elif left := self._left(target, place, sample, before):
                record |= {"outcome": "left", "error": ", ".join(left)[:200]}
            return record

    @contextlib.contextmanager
    def damaged(self, name: str, number: int, whole: str | None = None) -> Iterator[tuple[Path, Path, str]]:
        """The files of a case, as long as the block lasts: their folder, the damaged sample in it, and what was done."""
        target, rng = self.targets[name], random.Random(f"{self.seed} {name} {number}")
        samples = sorted(path.name for path in (self.work / "samples" / name).iterdir())
        chosen = whole or rng.choice(samples)
        place = Path(tempfile.mkdtemp(prefix="case-", dir=self.work))
        try:
            sample, outside = self._lay_out(place, name, chosen)
            what = "nothing" if whole else target.damage(rng, sample, outside)
            yield place, sample, what.replace(str(place), "")
        finally:
            shutil.rmtree(place, ignore_errors=True)

    def _lay_out(self, place, name, chosen):
        """Lay out the sample, and beside it a folder that damaged paths may lead to and no reader may open."""
        sample, outside = place / "given" / chosen, place / "given" / "outside"
        shutil.copytree(self.work / "samples" / name / chosen, sample)
        shutil.copytree(sample, outside)
        for path in sorted(sample.rglob("*")):
            if path.is_file() and not (outside / path.name).exists():
                shutil.copy(path, outside / path.name)
        (place / "work").mkdir()
        (place / "tmp").mkdir()
        return sample, outside

    def _read(self, target, sample, work, whole):
        size = sum(path.stat().st_size for path in sample.rglob("*") if path.is_file())
        _forget_peak()
        memory = _resident()
        loaded = error = None
        stage = "unclear"
        start = time.process_time()
        with messages() as said:
            try:
                with _time_limit():
                    loaded = target.load(sample)
                    stage = "crash"
                    used = target.use(loaded, work)
                    numbers = target.numbers(loaded, used)
                    found = {
                        "digest": digest(used, sample.parent.parent),
                        "not_finite": int(count_not_finite(numbers)),
                    }
            except Hang as hang:
                signal.setitimer(signal.ITIMER_PROF, 0)
                error, stage = hang, "hang"
            except Exception as caught:
                error = caught
        record = {"seconds": round(time.process_time() - start, 2)}
        if error is not None:
            record |= {"error": f"{type(error).__name__}: {error}"[:600], "where": place_of(error)}
            refused = stage != "hang" and is_refusal(error, sample)
            record["outcome"] = "memory" if is_memory(error) else "refused" if refused else stage
        else:
            record |= found | {"outcome": "equal" if whole and found["digest"] == whole[0] else "changed"}
            if whole and not target.keeps_nan and found["not_finite"] > whole[1] and not speaks_of_nan(said):
                record |= {"outcome": "nan", "error": f"{found['not_finite']} numbers"}
        if _resident() - memory > 2 * size + _MEMORY:
            record |= {"outcome": "memory", "error": f"{(_resident() - memory) >> 20} MiB for {size} bytes"}
        return record

    def _left(self, target, place, sample, before):
        """Files that are new, gone or other than before, where reading has no business."""
        after = _files(place)
        changed = {path for path in before.keys() | after.keys() if before.get(path) != after.get(path)}
        allowed = {path for pattern in target.writes for path in sample.rglob(pattern)}
        return sorted(
            str(path.relative_to(place))
            for path in changed
            if place / "work" not in path.parents
            and path not in allowed
            and not (("*" in target.writes) and sample in path.parents)
            and not (any(path.match(pattern) for pattern in target.writes) and sample in path.parents)
        )

    # ------------------------------------------------------------------------------------------------ many cases

    def run_all(
        self, cases: list[tuple[str, int]], seconds: float = float("inf"), progress=lambda done: None
    ) -> list[dict]:
        """Run cases in processes of their own, one after another.

        Args:
            cases: As [`Fuzzer.cases`] gives them.
            seconds (`float`, *optional*): When to stop, finished or not.
            progress (`Callable`, *optional*): Called with the number of cases that are done.

        Returns:
            `list[dict]`: one record for each case.
        """
        records, end = [], time.monotonic() + seconds
        while len(records) < len(cases) and time.monotonic() < end:
            records += self._in_a_process(cases[len(records) : len(records) + _CASES_PER_PROCESS], end)
            progress(len(records))
        return records

    def _in_a_process(self, cases, end):
        reader, writer = os.pipe()
        sys.stdout.flush()
        child = os.fork()
        if child == 0:
            os.close(reader)
            self._work(cases, writer)
        os.close(writer)
        records = []
        try:
            for line in _lines(reader, child, end):
                record = json.loads(line)
                if "broken" in record:
                    raise AssertionError(f"case {cases[len(records)]} cannot be run: {record['broken']}")
                records.append(record)
        finally:
            os.close(reader)
            killed = _end(child)
        if len(records) < len(cases) and time.monotonic() < end:
            name, number = cases[len(records)]
            outcome = "hang" if killed == signal.SIGKILL else "death"
            records.append(
                {"target": name, "number": number, "outcome": outcome, "what": "", "error": f"signal {killed}"}
            )
        return records

    def _work(self, cases, writer):
        """The child: never returns."""
        try:
            torch.set_num_threads(1)
            faulthandler.disable()
            resource.setrlimit(resource.RLIMIT_AS, (_status("VmSize") + _ADDRESS_SPACE,) * 2)
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            silent = os.open(os.devnull, os.O_WRONLY)
            os.dup2(silent, 1), os.dup2(silent, 2)
            for name, number in cases:
                os.write(writer, (json.dumps(self.run(name, number)) + "\n").encode())
        except BaseException:
            # A mistake of this program, and not of the library.
            os.write(writer, (json.dumps({"broken": traceback.format_exc()}) + "\n").encode())
        finally:
            os._exit(0)


def _lines(reader, child, end):
    """Lines from the child, until it ends or has worked on one for too long."""
    buffer, spent = b"", _cpu_seconds(child)
    while time.monotonic() < end:
        ready, _, _ = select.select([reader], [], [], 1.0)
        if ready:
            piece = os.read(reader, 1 << 16)
            if not piece:
                return
            *whole, buffer = (buffer + piece).split(b"\n")
            yield from whole
            spent = _cpu_seconds(child)
        elif _cpu_seconds(child) - spent > 3 * _CPU_SECONDS:
            return


def _end(child) -> int:
    """Ends the child; the signal that ended it, 0 if it was done."""
    for _ in range(50):
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return signal.SIGKILL


def _cpu_seconds(process) -> float:
    with contextlib.suppress(OSError):
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return 0.0


@contextlib.contextmanager
def _time_limit():
    armed = True

    def raise_hang(*_):
        if armed:
            raise Hang

    before = signal.signal(signal.SIGPROF, raise_hang)
    # Again and again: the first may come while a library catches everything.
    signal.setitimer(signal.ITIMER_PROF, _CPU_SECONDS, 0.5)
    try:
        yield
    finally:
        armed = False
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def _status(field) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def _resident() -> int:
    """The most memory that was resident since the last [`_forget_peak`]."""
    return _status("VmHWM")


def _forget_peak():
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _files(place: Path) -> dict[Path, tuple]:
    """Every file below a folder, with what changes when it is written."""
    return {
        path: (path.lstat().st_size, path.lstat().st_mtime_ns)
        for path in place.rglob("*")
        if path.is_symlink() or not path.is_dir()
    } | {path: () for path in place.rglob("*") if path.is_dir()}


@contextlib.contextmanager
def _temporary(folder: Path):
    before, tempfile.tempdir = tempfile.tempdir, str(folder)
    try:
        yield
    finally:
        tempfile.tempdir = before


@functools.cache
def _libc():
    return ctypes.CDLL(None, use_errno=True)


@contextlib.contextmanager
def _opened(folder: Path):
    """Yields a set that, after the block, holds the names of the files that were opened or changed in a folder."""
    found: set[str] = set()
    watch = _libc().inotify_init1(os.O_NONBLOCK)
    for each in (folder, *(path for path in folder.rglob("*") if path.is_dir())):
        _libc().inotify_add_watch(watch, os.fsencode(each), _IN_OPEN | _IN_MODIFY | _IN_CREATE | _IN_DELETE)
    try:
        yield found
    finally:
        with contextlib.suppress(BlockingIOError):
            events = os.read(watch, 1 << 16)
            while events:
                _, mask, _, length = struct.unpack_from("iIII", events)
                name = events[16 : 16 + length].rstrip(b"\0").decode(errors="replace")
                # Looking into a folder opens it.
                if name and (not mask & _IN_ISDIR or mask & (_IN_CREATE | _IN_DELETE)):
                    found.add(name)
                events = events[16 + length :]
        os.close(watch)
