"""Print results and messages, escaped for terminals."""

import argparse
import contextlib
import importlib
import logging
import os
import re
import sys
import warnings

from ..errors import TranscoderError
from ..text.columns import aligned
from ..text.printable import printable
from ..text.similar import did_you_mean
from ..text.strict_json import to_json


_COLOR = re.compile(r"\x1b\[[0-9;]*m")


def echo(*lines: object, error: bool = False) -> None:
    r"""Print lines.

    Control characters are escaped, including line breaks, so that a value from a file can neither control the terminal nor
    imitate other lines. A text of several lines is given as `*text.split("\n")`.

    Args:
        lines (`object`): Lines to print; without any, an empty line is printed.
        error (`bool`, *optional*, defaults to `False`): Whether to print to stderr instead of stdout, which is for results.
    """
    stream = sys.stderr if error else sys.stdout
    text = "\n".join(printable(line) for line in lines or ("",))
    # Consoles with another encoding than UTF-8 show escapes of characters that they lack.
    encoding = getattr(stream, "encoding", None) or "utf-8"
    stream.write(text.encode(encoding, "backslashreplace").decode(encoding) + "\n")
    stream.flush()


def print_json(value) -> None:
    """Print a value as ASCII JSON, in which control characters are escaped."""
    echo(*to_json(value, default=str).replace("\x7f", "\\u007f").split("\n"))


def print_table(head: list[str], rows: list[list[str]], left: int = 1) -> None:
    """Print aligned columns; arguments as for [`~hf_transcoders.text.columns.aligned`]."""
    echo(*aligned(head, rows, left).split("\n"))


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows defaults other than empty ones, and keeps the line breaks of examples."""

    def _get_help_string(self, action):
        if action.default is None or action.default is False or action.default == []:
            return action.help
        return super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """Takes options with hyphens or underscores, and reports errors of a command line in one sentence."""

    def __init__(self, **options):
        super().__init__(**{"formatter_class": HelpFormatter, "allow_abbrev": False, **options})
        self._intermixed = False

    def parse_known_args(self, args=None, namespace=None):
        words = list(sys.argv[1:] if args is None else args)
        # Words after a bare `--` are not options.
        options = words[: words.index("--")] if "--" in words else words
        options = [self._spelled(word) for word in options]
        if self._subparsers is None:
            self._refuse_unknown(options)
        known, further = super().parse_known_args([*options, *words[len(options) :]], namespace)
        if further and not further[0].startswith("-") and not self._intermixed:
            self.error(f"'{further[0]}' is one argument too many")
        return known, further

    def parse_known_intermixed_args(self, args=None, namespace=None):
        # Positional arguments are left over by the first of two passes.
        self._intermixed = True
        try:
            return super().parse_known_intermixed_args(args, namespace)
        finally:
            self._intermixed = False

    def _refuse_unknown(self, words):
        """Report a mistyped option first: other errors, such as a missing option, often follow from it."""
        for word in words:
            name = word.partition("=")[0]
            if re.fullmatch(r"--?[a-zA-Z][\w-]*", name) and name not in self._option_string_actions:
                self.error(f"there is no option {name}{did_you_mean(name, self._option_string_actions)}")

    def _spelled(self, word):
        """Return an option in its declared spelling, and any other word as it is."""
        name, equals, value = word.partition("=")
        if not name.startswith("--") or name in self._option_string_actions:
            return word
        hyphens, underscores = name.replace("_", "-"), f"--{name[2:].replace('-', '_')}"
        declared = next((each for each in (hyphens, underscores) if each in self._option_string_actions), name)
        return declared + equals + value

    def _print_message(self, message, file=None):
        super()._print_message(printable(message, keep="\n"), file)

    def _get_values(self, action, arg_strings):
        # The name of the option says what a value is for.
        try:
            return super()._get_values(action, arg_strings)
        except argparse.ArgumentError as error:
            choices = re.fullmatch(r"invalid choice: '?(.*?)'? \(choose from .*\)", error.message, re.DOTALL)
            if choices is None or action.choices is None:
                raise
            name = "/".join(action.option_strings) or action.dest
            known = [str(choice) for choice in action.choices]
            self.error(
                f"{name} is '{choices[1][:60]}', but must be one of {', '.join(known)}{did_you_mean(choices[1], known)}"
            )

    def error(self, message):
        message = re.sub(r"^the following arguments are required: ", "give ", message)
        message = re.sub(r"^argument (\S+): ", r"\1: ", message)
        raise TranscoderError(f"{message} (see `{self.prog} --help`).")


def quiet_transformers() -> None:
    """Keep bars of files that load at once off the terminal (long steps have bars of their own), and stdout for results."""
    import transformers

    transformers.logging.disable_progress_bar()
    if os.environ.get("WANDB_MODE") == "offline":
        # Says so on stdout when it is first imported.
        with contextlib.redirect_stdout(sys.stderr):
            importlib.import_module("transformers.integrations.integration_utils")


@contextlib.contextmanager
def printable_logs():
    """Escape log messages and warnings of every library within the context, and indent their further lines."""
    make_record, format_warning = logging.getLogRecordFactory(), warnings.formatwarning

    def escaped(text):
        # Colors of other libraries are removed.
        return printable(_COLOR.sub("", text), keep="\n").rstrip("\n").replace("\n", "\n    ")

    def make_printable(*args, **kwargs):
        record = make_record(*args, **kwargs)
        try:
            record.msg, record.args = escaped(record.getMessage()), None
        except (TypeError, ValueError):
            # Logging itself reports messages that do not fit their arguments.
            pass
        return record

    def format_printable(message, *args, **kwargs):
        return escaped(format_warning(message, *args, **kwargs)) + "\n"

    logging.setLogRecordFactory(make_printable)
    warnings.formatwarning = format_printable
    try:
        yield
    finally:
        logging.setLogRecordFactory(make_record)
        warnings.formatwarning = format_warning
