"""Read options from a YAML file, with the types of the command line."""

import argparse
from dataclasses import dataclass
from typing import Any

from ..errors import TranscoderError
from ..text.printable import printable
from ..text.strict_json import read_yaml, to_json
from .values import truth


@dataclass(frozen=True)
class _Plain:
    """An unquoted value that YAML does not read as text: `010` is 8, `1:30` is 90, and `no` is false."""

    text: str
    value: Any


def read_defaults(parser: argparse.ArgumentParser, path: str) -> None:
    """Make the values of a YAML file the defaults of a parser.

    Raises:
        [`TranscoderError`]: An option does not exist or is repeated, or a value does not fit it. Values that YAML and the
            command line read differently are refused, as are numbers in place of text.
    """
    actions: dict[str, argparse.Action] = {}
    for action in parser._actions:
        # The `--no-...` of an option that is true by default follows it and has the same name.
        actions.setdefault(action.dest, action)
    content = read_yaml(path, object, scalar=_Plain)
    if not isinstance(content, dict):
        raise TranscoderError(f"{path} must hold `name: value` lines, as in `num_features: 4608`.")
    seen = {}
    for key, value in content.items():
        name = printable(key.text if isinstance(key, _Plain) else key)
        action = actions.get(name.replace("-", "_"))
        if action is None or action.dest in ("help", "help_all", "config"):
            raise TranscoderError(
                f"{path} has an option '{name[:80]}' that does not exist: `--help-all` lists all options."
            )
        if action.dest in seen:
            raise TranscoderError(
                f"{path} gives '{seen[action.dest]}' and '{name}', which are the same option: keep one."
            )
        seen[action.dest] = name
        where = f"{path} gives '{name}'"
        several = action.nargs in ("+", "*")
        if isinstance(value, list) and not several:
            raise TranscoderError(
                f"{where} several values, but it takes one: choose one of them (`hf-transcoders sweep` trains a dictionary "
                "for each value of an option of dictionaries)."
            )
        if isinstance(value, _Plain) and value.value is None:
            if action.default is not None:
                raise TranscoderError(f"{where} no value: give one, or leave the line out.")
            continue
        as_bool = truth if action.nargs == 0 else action.type
        values = [_convert(entry, as_bool, action, where) for entry in (value if isinstance(value, list) else [value])]
        if several and not values:
            raise TranscoderError(f"{where} an empty list: give a value, or leave the line out.")
        action.required = False
        parser.set_defaults(**{action.dest: values if several else values[0]})


def _convert(given, type_, action, where):
    """Convert one value as the command line would."""
    if isinstance(given, dict) and action.dest in _fields_of_mappings():
        # The trainer reads these as JSON.
        return to_json({_text(key): _value(entry, where) for key, entry in given.items()}, indent=None)
    if not isinstance(given, str | _Plain):
        raise TranscoderError(f"{where} a {type(given).__name__}, but it takes a single value: give one.")
    text, value = (given.text, given.value) if isinstance(given, _Plain) else (given, given)
    shown = printable(text)[:60]
    if type_ in (None, str):
        if isinstance(given, _Plain) and text not in (action.choices or ()):
            raise TranscoderError(f"{where} the value '{shown}', but it takes text: put that in quotes.")
        converted = text
    else:
        # `yes`, `on` and `True` are equal for options that are on or off.
        text = str(value).lower() if isinstance(value, bool) and type_ is truth else text
        try:
            converted = type_(text)
        except (ValueError, TypeError, ArithmeticError, argparse.ArgumentTypeError) as error:
            raise TranscoderError(
                f"{where} the value '{shown}', which does not fit: {printable(error)[:200]}."
            ) from error
        if isinstance(value, int | float) and not isinstance(value, bool) and value != converted:
            raise TranscoderError(
                f"{where} the value '{shown}', which is {value} in YAML and {converted} on the command line: write "
                f"{converted if isinstance(converted, int) else value}."
            )
    if action.choices is not None and converted not in action.choices:
        raise TranscoderError(f"{where} the value '{shown}': choose from {', '.join(map(str, action.choices))}.")
    return converted


def _fields_of_mappings() -> list[str]:
    # Imported where a file holds a mapping: it takes seconds.
    from transformers import TrainingArguments

    return TrainingArguments._VALID_DICT_FIELDS


def _value(given, where):
    """Convert a value within a mapping as YAML reads it."""
    if isinstance(given, _Plain):
        if not isinstance(given.value, bool | int | float | None):
            raise TranscoderError(
                f"{where} the value {printable(given.text)[:60]}: put it in quotes, or give a number."
            )
        return given.value
    if isinstance(given, dict):
        return {_text(key): _value(entry, where) for key, entry in given.items()}
    if isinstance(given, list):
        return [_value(entry, where) for entry in given]
    return given


def _text(key):
    return key.text if isinstance(key, _Plain) else str(key)
