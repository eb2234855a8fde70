"""Print each log as one readable line above the progress bar, and announce long steps."""

import contextlib
import sys
import threading
from collections.abc import Iterator

from tqdm.auto import tqdm
from transformers import PrinterCallback, ProgressCallback

from ..text.printable import printable


# Seconds that a piece of work may take without a word.
_PATIENCE = 2.0
# Number of dictionaries that fit on a line; for more, it has the range of each metric.
_MOST = 4


class TrainingProgressCallback(ProgressCallback):
    """The Trainer's bar, with logs as `tokens · tokens/s · dictionary: FVU, L0, dead` instead of a printed `dict`."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero or self.training_bar is None:
            return
        if line := format_log(logs or {}):
            self.training_bar.write(line)


class TrainingPrinterCallback(PrinterCallback):
    """Prints the same lines without a bar, on stderr like the bar: stdout is for results."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_local_process_zero and (line := format_log(logs or {})):
            print(line, file=sys.stderr, flush=True)


def format_log(logs: dict[str, float]) -> str:
    """
    Formats a log of [`TranscoderTrainer`] as one line.

    Args:
        logs (`dict[str, float]`): Log, as passed to callbacks.

    Returns:
        `str`: line of text, empty for a log without metrics of dictionaries.
    """
    names = [key.removesuffix("/fvu") for key in logs if key.endswith("/fvu")]
    if not names:
        return ""
    parts = []
    if "tokens" in logs:
        parts.append(f"{logs['tokens']:>11,} tokens")
    if "tokens_per_second" in logs:
        parts.append(f"{logs['tokens_per_second']:>8,.0f}/s")
    if len(names) > _MOST:
        ranges = [
            f"{label} {min(values):{form}} to {max(values):{form}}"
            for metric, label, form in (
                ("fvu", "FVU", ".3f"),
                ("l0", "L0", ".1f"),
                ("ce_recovered_mean", "CE recovered", ".3f"),
            )
            if (values := [logs[f"{name}/{metric}"] for name in names if f"{name}/{metric}" in logs])
        ]
        return "  ".join([*parts, f"{len(names)} dictionaries: {', '.join(ranges)}"])
    for name in names:
        text = f"{printable(name.removeprefix('eval_'))}: FVU {logs[f'{name}/fvu']:.3f}, L0 {logs[f'{name}/l0']:.1f}"
        if (dead := logs.get(f"{name}/dead_fraction")) is not None:
            text += f", dead {dead:.1%}"
        if (recovered := logs.get(f"{name}/ce_recovered_mean")) is not None:
            text += f", CE recovered {recovered:.3f}"
        parts.append(text)
    return "  ".join(parts)


@contextlib.contextmanager
def working(what: str, show: bool = True) -> Iterator[None]:
    """
    Shows the duration of a step that has no measure of progress, once it takes longer than two seconds.

    Args:
        what (`str`): What is done, such as `"saving a checkpoint"`.
        show (`bool`, *optional*, defaults to `True`): Whether to show it. Inside another block, nothing is shown.
    """
    if not show or _at_work.locked():
        yield
        return
    done = threading.Event()

    def tick():
        if done.wait(_PATIENCE):
            return
        with tqdm(bar_format="{desc}: {elapsed}", desc=what, leave=False) as bar:
            while not done.wait(1.0):
                bar.refresh()

    thread = threading.Thread(target=tick, daemon=True)
    with _at_work:
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()


_at_work = threading.Lock()
