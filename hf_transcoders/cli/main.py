"""Entry point: finds the command, runs it, turns mistakes into one sentence and an exit code."""

import argparse
import contextlib
import importlib
import os
import sys

from ..errors import TranscoderError
from ..version import __version__
from .terminal import Parser, echo, printable_logs


# Command -> what `--help` says of it. Each is a module here with `add_arguments(parser)` and `run(args)`.
_COMMANDS = {
    "demo": "the whole job on a real model in a few minutes, with nothing to download but packages",
    "train": "train transcoders or SAEs on a language model",
    "plan": "memory, disk and time that a training run will need",
    "sweep": "train a grid of dictionaries over one stream of activations, ending in their Pareto fronts",
    "runs": "list, compare and draw what runs have recorded",
    "evaluate": "sparsity, fidelity and loss recovered of trained dictionaries",
    "features": "what features do: top contexts and output tokens",
    "push": "publish a dictionary or set on the Hub",
    "convert": "a dictionary or set in the format of another library, or from it",
    "tasks": "prompts for circuits: what there is, what a tokenizer makes of it, how well a model does it",
    "circuits": "which heads do a task, which of them two tasks share, and what repairs one of them",
    "graph": "what made a model say what it says: the attribution graph of a prompt, as a page",
    "paths": "the strongest paths through features, heads and tokens to a logit or feature",
    "study": "case studies of transcoders: greater-than, whole-model replacement, blind guesses at features",
    "info": "what a dictionary or set is; without a path, what this machine has",
}

EXIT_OK, EXIT_FAILED, EXIT_MISUSED, EXIT_INTERRUPTED = 0, 1, 2, 130


def main(argv: list[str] | None = None) -> int:
    """
    Runs one command.

    Args:
        argv (`list[str]`, *optional*): Arguments without the program's name. Defaults to those of the process.

    Returns:
        `int`: 0 done, 2 a mistake the user can mend (one sentence on stderr), 1 anything else, 130 interrupted.
    """
    argv = sys.argv[1:] if argv is None else argv
    # Only the module of the command in question is imported: `--help` answers at once.
    name = argv[0] if argv and argv[0] in _COMMANDS else None
    debug, rest = _take_debug(argv[1:] if name else argv)
    try:
        if name is None:
            return _without_command(argv)
        command = importlib.import_module(f".{name}", __package__)
        # Bars for files that load in a blink; those for work that takes time are our own.
        import transformers

        transformers.logging.disable_progress_bar()
        if os.environ.get("WANDB_MODE") == "offline":
            # Says so on stdout when it is first imported, and stdout is for results.
            with contextlib.redirect_stdout(sys.stderr):
                importlib.import_module("transformers.integrations.integration_utils")
        with printable_logs():
            command.run(command.parse(rest, prog=f"hf-transcoders {name}"))
        return EXIT_OK
    except KeyboardInterrupt:
        echo("", "Interrupted.", error=True)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # The reader of our output went away (`| head`): nothing is wrong, and nothing more can be printed.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_OK
    except Exception as error:
        if debug:
            raise
        sentence, code = _explain(error)
        echo(f"hf-transcoders{f' {name}' if name else ''}: {sentence}", error=True)
        return code


def _without_command(argv: list[str]) -> int:
    """Answers `--help` and `--version`; anything else is a mistake."""
    parser = _make_parser()
    args = parser.parse_args(argv)
    if args.command is not None:
        parser.error(f"the command comes first: hf-transcoders {args.command} ...")
    parser.print_help()
    return EXIT_MISUSED


def _take_debug(words: list[str]) -> tuple[bool, list[str]]:
    """Takes our `--debug` out; with a value it is the Trainer's own and stays."""
    for position, word in enumerate(words):
        if word == "--debug" and (position + 1 == len(words) or words[position + 1].startswith("-")):
            return True, words[:position] + words[position + 1 :]
    return False, words


def _make_parser() -> argparse.ArgumentParser:
    width = max(map(len, _COMMANDS)) + 2
    commands = "\n".join(f"  {name:<{width}}{text}" for name, text in _COMMANDS.items())
    parser = Parser(
        prog="hf-transcoders",
        description="Train, evaluate and read transcoders of Hugging Face language models.",
        epilog=f"commands:\n{commands}\n\nStart with `hf-transcoders demo`; each command explains itself with --help.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--debug", action="store_true", help="after a command: show the traceback of an error")
    parser.add_argument("--version", action="version", version=f"hf_transcoders {__version__}")
    parser.add_argument("command", nargs="?", choices=list(_COMMANDS), metavar="command", help="one of those below")
    return parser


def _explain(error: Exception) -> tuple[str, int]:
    """One sentence for the user, and the exit code."""
    from huggingface_hub.errors import StrictDataclassError

    if isinstance(error, TranscoderError):
        return str(error), EXIT_MISUSED
    if isinstance(error, StrictDataclassError):
        # Its first line names the field, its last the reason.
        return " ".join(line.strip() for line in str(error).splitlines()), EXIT_MISUSED
    if isinstance(error, OSError | ValueError):
        text = " ".join(str(error).split())
        return text or type(error).__name__, EXIT_MISUSED
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text} (run again with --debug to see where)", EXIT_FAILED
