"""Types of command-line values, and checks of output folders before any work starts."""

import argparse
import math
import re
import tempfile
from decimal import Decimal
from pathlib import Path

from ..errors import TranscoderError


# Largest integer of a tensor.
_LARGEST = 2**63 - 1
# Ends of numbers as people write them, such as `1M` tokens.
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "g": 10**9}
_WHOLE = re.compile(r"(-?\d+(?:_\d+)*)(\.\d+)?(e\+?\d{1,2})?([kmbg]?)", re.IGNORECASE | re.ASCII)


def whole_number(text: str) -> int:
    """Type of options that take a whole number, also written as `1M`, `20k`, `1e6` or `1_000_000`."""
    found = _WHOLE.fullmatch(text.strip())
    # A decimal point needs a power of ten after it: `1.5M` is whole, and `4.0` a number of another kind.
    if found is None or len(text) > 40 or (found[2] and not (found[3] or found[4])):
        raise argparse.ArgumentTypeError(
            f"'{text[:40]}' is not a whole number; give one such as 1000000, 1_000_000 or 1M"
        )
    number = Decimal(found[1].replace("_", "") + (found[2] or "") + (found[3] or "")) * _UNITS[found[4].lower()]
    if number != int(number):
        raise argparse.ArgumentTypeError(
            f"'{text[:40]}' is not a whole number; give one such as 1000000, 1_000_000 or 1M"
        )
    return int(number)


def whole(minimum: int, maximum: int = _LARGEST):
    """Type of options that take a whole number between two bounds, both included."""

    def convert(text: str) -> int:
        number = whole_number(text)
        if not minimum <= number <= maximum:
            bounds = f"give at least {minimum}" if number < minimum else f"give at most {maximum}"
            raise argparse.ArgumentTypeError(f"{text[:40]} is out of range; {bounds}")
        return number

    return convert


def positive(text: str) -> float:
    """Type of options that take a positive number."""
    return _real(text, 0, math.inf, "a number above 0")


def not_negative(text: str) -> float:
    """Type of options that take 0 or a positive number."""
    return _real(text, math.nextafter(0, -1), 1e9, "a number of at least 0 and below a billion")


def factor(text: str) -> float:
    """Type of options that take a positive factor."""
    return _real(text, 0, 1e9, "a number above 0 and below a billion")


def inner_share(text: str) -> float:
    """Type of options that take a number between 0 and 1, both excluded."""
    return _real(text, 0, 1, "a number between 0 and 1, both excluded")


def share(text: str) -> float:
    """Type of options that take a number between 0 and 1, both included."""
    return _real(text, math.nextafter(0, -1), math.nextafter(1, 2), "a number between 0 and 1")


def truth(text: str) -> bool:
    """Type of options that are on or off, in words that Transformers takes."""
    for words, value in ((("yes", "true", "t", "y", "1"), True), (("no", "false", "f", "n", "0"), False)):
        if text.lower() in words:
            return value
    raise argparse.ArgumentTypeError(f"'{text[:40]}' is neither true nor false; give one of these")


def _real(text, above, below, what):
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not above < number < below:
        raise argparse.ArgumentTypeError(f"'{text[:40]}' is out of range; give {what}")
    return number


# Every generator of random numbers accepts these.
seed = whole(0, 2**32 - 1)


def device(name: str) -> str:
    """Type of options that take a device of this machine."""
    import torch

    try:
        known = torch.device(name)
        if known.type == "meta":
            raise ValueError("it holds no numbers")
        torch.empty(1, device=known)
    except Exception as error:
        raise argparse.ArgumentTypeError(
            f"'{name}' is not a device that PyTorch can use here ({str(error).splitlines()[0][:120]}): leave it out, or give "
            "cpu, cuda or mps"
        ) from None
    return name


def unicode_text(text: str) -> str:
    """Type of options that take text for a tokenizer, which must be Unicode."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise argparse.ArgumentTypeError(
            f"{text[:40]!r} is not Unicode text in the encoding of the terminal"
        ) from None
    return text


def output_folder(path: str, option: str = "--output") -> Path:
    """Return the folder for results; a file or a folder that cannot be written is refused before any work starts."""
    if Path(path).exists() and not Path(path).is_dir():
        raise TranscoderError(f"{path} is a file, but results need a folder: give another {option}.")
    _check_writable(path, option)
    return Path(path)


def _check_writable(folder, option):
    """Refuse a folder that cannot be created or written."""
    folder = Path(folder).absolute()
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    if not existing.is_dir():
        raise TranscoderError(f"{existing} is a file, so nothing can be written below it: give another {option}.")
    try:
        # Permissions do not tell: file systems that are read-only and folders that are locked refuse new files as well.
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise TranscoderError(
            f"{existing} is not writable ({error.strerror or error}): give another {option}."
        ) from error
