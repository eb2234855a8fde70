"""Files of JSON lines to which a process adds as it goes; a line that was cut when it died does not count."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .strict_json import parse_json, to_json


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """
    Reads the complete lines of a file, each an object.

    Args:
        path (`Path`): The file.

    Raises:
        [`TranscoderError`]: a complete line is not a JSON object; the text says which.
    """
    lines = path.read_bytes().split(b"\n")[:-1]
    return [parse_json(line, f"Line {number} of {path}") for number, line in enumerate(lines, 1)]


def append_json_line(path: Path, value: Mapping[str, Any]) -> None:
    """Adds an object to a file, in place of a line that was cut; the file and its folder are made if needed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab+") as file:
        size = file.tell()
        if size:
            file.seek(size - 1)
            if file.read(1) != b"\n":
                file.seek(0)
                file.truncate(file.read().rfind(b"\n") + 1)
        file.write(to_json(value, indent=None).encode() + b"\n")
