"""Entry point: find the command, run it, and turn errors into one sentence and an exit code."""

import argparse
import importlib
import os
import sys

from ..errors import TranscoderError
from ..version import __version__
from .terminal import Parser, echo, printable_logs, quiet_transformers


# Command -> its line in `--help`. Each is a module here with `parse(argv, prog)` and `run(args)`.
_COMMANDS = {
    "demo": "train, evaluate and inspect dictionaries of a real model in a few minutes, without the Hub",
    "train": "train transcoders or SAEs on a language model",
    "baselines": "make dictionaries to compare trained ones with: components, random directions, neurons",
    "plan": "estimate the memory, disk space and duration of a training run",
    "sweep": "train a grid of dictionaries on one stream of activations and draw their Pareto fronts",
    "runs": "list, compare and plot recorded runs",
    "evaluate": "measure the sparsity, fidelity and loss recovered of trained dictionaries",
    "features": "show top activations and promoted tokens of features",
    "explain": "explain features by rules or a chat model, and score the explanations beside controls",
    "push": "publish a dictionary or set on the Hub",
    "convert": "convert a dictionary or set from or to the format of another library",
    "tasks": "list tasks for circuits, show their prompts, and measure a model on them",
    "circuits": "find the heads that implement a task, and compare the circuits of two tasks",
    "graph": "compute the attribution graph of a prompt, as an interactive page",
    "paths": "find the strongest paths through features, heads and tokens to a logit or feature",
    "study": "run case studies of papers: greater-than, replacement, explanations, feature patching, effects and trees, blind",
    "info": "describe a dictionary, a set or this machine",
}

EXIT_OK, EXIT_FAILED, EXIT_MISUSED, EXIT_INTERRUPTED = 0, 1, 2, 130


def main(argv: list[str] | None = None) -> int:
    """
    Run one command.

    Args:
        argv (`list[str]`, *optional*): Arguments without the name of the program. Defaults to those of the process.

    Returns:
        `int`: Exit code: 0 for success, 2 for an error the user can fix (one sentence on stderr), 1 for any other error,
        130 if interrupted (143 by SIGTERM while training).
    """
    argv = sys.argv[1:] if argv is None else argv
    # Read when tqdm is imported: bars of steps that take less than two seconds would only hide the message after them.
    os.environ.setdefault("TQDM_DELAY", "2")
    # Only the module of the command in question is imported: `--help` answers at once.
    name = argv[0] if argv and argv[0] in _COMMANDS else None
    debug, rest = _take_debug(argv[1:] if name else argv)
    try:
        if name is None:
            return _without_command(argv)
        command = importlib.import_module(f".{name}", __package__)
        with printable_logs():
            args = command.parse(rest, prog=f"hf-transcoders {name}")
            quiet_transformers()
            command.run(args)
        return EXIT_OK
    except KeyboardInterrupt as error:
        # A run that was interrupted says where it stopped, and which signal it was.
        echo("", str(error) or "Interrupted.", error=True)
        return getattr(error, "exit_code", EXIT_INTERRUPTED)
    except BrokenPipeError:
        # The reader of the output is gone (`| head`): this is not an error, and nothing more can be printed.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_OK
    except Exception as error:
        if debug:
            raise
        sentence, code = _explain(error)
        echo(f"hf-transcoders{f' {name}' if name else ''}: {sentence}", error=True)
        return code


def _without_command(argv: list[str]) -> int:
    """Answer `--help` and `--version`, and refuse anything else."""
    parser = _make_parser()
    # What follows a mistyped command are options of that command.
    args = parser.parse_args(argv if not argv or argv[0].startswith("-") else argv[:1])
    if args.command is not None:
        parser.error(f"the command comes first: hf-transcoders {args.command} ...")
    parser.print_help()
    return EXIT_MISUSED


def _take_debug(words: list[str]) -> tuple[bool, list[str]]:
    """Take our `--debug` out; with a value, it is an option of the trainer and stays."""
    for position, word in enumerate(words):
        if word == "--debug" and (position + 1 == len(words) or words[position + 1].startswith("-")):
            return True, words[:position] + words[position + 1 :]
    return False, words


def _make_parser() -> argparse.ArgumentParser:
    width = max(map(len, _COMMANDS)) + 2
    commands = "\n".join(f"  {name:<{width}}{text}" for name, text in _COMMANDS.items())
    parser = Parser(
        prog="hf-transcoders",
        description="Train, evaluate and interpret transcoders of Hugging Face language models.",
        epilog=f"commands:\n{commands}\n\nStart with `hf-transcoders demo`; `hf-transcoders COMMAND --help` explains a command.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--debug", action="store_true", help="after a command: show the traceback of an error")
    parser.add_argument("--version", action="version", version=f"hf_transcoders {__version__}")
    parser.add_argument(
        "command", nargs="?", choices=list(_COMMANDS), metavar="command", help="one of the commands below"
    )
    return parser


def _explain(error: Exception) -> tuple[str, int]:
    """One sentence for the user, and the exit code."""
    if isinstance(error, TranscoderError):
        return str(error), EXIT_MISUSED
    from huggingface_hub.errors import StrictDataclassError

    if isinstance(error, StrictDataclassError):
        # Its first line names the field, its last the reason.
        return " ".join(line.strip() for line in str(error).splitlines()), EXIT_MISUSED
    if isinstance(error, OSError | ValueError):
        text = " ".join(str(error).split())
        return text or type(error).__name__, EXIT_MISUSED
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text} (run again with --debug to see where)", EXIT_FAILED
