"""What the commands print: everything goes through [`echo`]."""

import argparse
import contextlib
import logging
import re
import sys
import warnings

from ..errors import TranscoderError
from ..text.columns import aligned
from ..text.printable import printable
from ..text.strict_json import to_json


_COLOR = re.compile(r"\x1b\[[0-9;]*m")


def echo(*lines: object, error: bool = False) -> None:
    r"""Print lines.

    What a terminal might act on is escaped, line breaks included: a value from a file can neither command the terminal
    nor look like a line of ours. A text of several lines is given as `*text.split("\n")`.

    Args:
        lines (`object`): Each becomes one line; none prints an empty one.
        error (`bool`, *optional*, defaults to `False`): Print to stderr; stdout belongs to results.
    """
    stream = sys.stderr if error else sys.stdout
    text = "\n".join(printable(line) for line in lines or ("",))
    # Consoles of other encodings than UTF-8 show the escape of what they do not have.
    encoding = getattr(stream, "encoding", None) or "utf-8"
    stream.write(text.encode(encoding, "backslashreplace").decode(encoding) + "\n")
    stream.flush()


def print_json(value) -> None:
    """Print a value as JSON in ASCII, in which every control character is an escape."""
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
    """Takes options with hyphens or underscores, and says in one sentence what is wrong with a command line."""

    def __init__(self, **options):
        super().__init__(**{"formatter_class": HelpFormatter, "allow_abbrev": False, **options})

    def parse_known_args(self, args=None, namespace=None):
        words = list(sys.argv[1:] if args is None else args)
        # What follows a bare `--` is no option.
        options = words[: words.index("--")] if "--" in words else words
        return super().parse_known_args([*map(self._spelled, options), *words[len(options) :]], namespace)

    def _spelled(self, word):
        """An option in the spelling that was declared; every other word as it is."""
        name, equals, value = word.partition("=")
        if not name.startswith("--") or name in self._option_string_actions:
            return word
        hyphens, underscores = name.replace("_", "-"), f"--{name[2:].replace('-', '_')}"
        declared = next((each for each in (hyphens, underscores) if each in self._option_string_actions), name)
        return declared + equals + value

    def _print_message(self, message, file=None):
        super()._print_message(printable(message, keep="\n"), file)

    def error(self, message):
        raise TranscoderError(f"{message} (`{self.prog} --help` tells more).")


@contextlib.contextmanager
def printable_logs():
    """Within the context, log messages and warnings of every library are escaped; further lines of a message are indented."""
    make_record, format_warning = logging.getLogRecordFactory(), warnings.formatwarning

    def escaped(text):
        # Colors of other libraries go.
        return printable(_COLOR.sub("", text), keep="\n").rstrip("\n").replace("\n", "\n    ")

    def make_printable(*args, **kwargs):
        record = make_record(*args, **kwargs)
        try:
            record.msg, record.args = escaped(record.getMessage()), None
        except (TypeError, ValueError):
            # A message that does not fit its arguments: logging reports that itself.
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
