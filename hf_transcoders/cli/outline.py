"""
Options and their values, read from the source of the library: importing the arguments of transformers' Trainer, or PyTorch, takes
seconds, in which no mistake is named and no help is shown.

Types are read as `transformers.HfArgumentParser` reads them. Values whose type a source does not tell are not checked here.
"""

import argparse
import ast
import dataclasses
import functools
import importlib
import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from .values import truth


# Value of a field that only the import of its module gives.
UNKNOWN = object()
_TYPES = {"int": int, "float": float, "str": str, "bool": truth}


@dataclass(frozen=True)
class DeclaredField:
    """A field of a dataclass.

    Args:
        types (`str`): Its annotation, as written.
        default (`Any`): Its default, or `UNKNOWN`.
        options (`dict`): Arguments of `add_argument` that its metadata or its type give.
    """

    types: str
    default: Any
    options: dict[str, Any]


def declared_fields(path: Path, name: str) -> dict[str, DeclaredField]:
    """
    Read the fields of a dataclass and of its bases.

    Args:
        path (`Path`): Source of its module.
        name (`str`): Its name.

    Returns:
        `dict[str, DeclaredField]`

    Raises:
        `LookupError`: a class is not found where the source says.
        `OSError`, `SyntaxError`: a source cannot be read.
    """
    path, definition = _find_class(path, name)
    fields = {}
    for base in definition.bases:
        fields |= declared_fields(path, ast.unparse(base))
    for line in definition.body:
        if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name):
            fields[line.target.id] = _declared(path, line)
    return fields


class LibraryNames:
    """
    Choices of an option that a module of the library lists. They are read from its source when a value is checked or help is
    shown; the module is imported where its source does not tell them.

    Args:
        module (`str`): Module, relative to the package.
        name (`str`):
            Its collection of names, a `Literal` of them, or a field of a class with such a type (`"TranscoderConfig.activation"`).
        first (`str`): Names that the command adds before these.
    """

    def __init__(self, module: str, name: str, *first: str):
        self.module, self.name, self.first = module, name, first

    def __iter__(self):
        yield from self.first
        yield from self._names()

    def __contains__(self, value):
        return value in tuple(self)

    def _names(self) -> list[str]:
        try:
            return _listed(_package_path(self.module), self.name)
        except (LookupError, OSError, SyntaxError):
            names = getattr(importlib.import_module(self.module, __package__), self.name)
            return list(get_args(names) or names)


def fields_of(cls) -> dict[str, DeclaredField]:
    """Return the fields of a dataclass that is imported already."""
    found = {}
    for field in dataclasses.fields(cls):
        types = field.type.__name__ if type(field.type) is type else str(field.type)
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        found[field.name] = DeclaredField(types, default, dict(field.metadata))
    return found


def add_declared(parser: argparse.ArgumentParser, fields: dict[str, DeclaredField]) -> None:
    """Add an option for each field."""
    for name, field in fields.items():
        options = {"help": "", "default": None if field.default is UNKNOWN else field.default, **field.options}
        hyphens = name.replace("_", "-")
        type_, optional = _taken(field.types)
        if type_.startswith("list["):
            options |= {"nargs": "+", "type": _TYPES.get(type_[5:-1])}
        elif type_ == "bool" and not (optional and field.default is None):
            options |= {"nargs": "?", "const": True, "type": truth}
        else:
            options["type"] = _TYPES.get(type_)
        parser.add_argument(f"--{hyphens}", **options)
        if type_ == "bool" and field.default is True:
            parser.add_argument(
                f"--no-{hyphens}", action="store_false", dest=name, default=False, help=options["help"]
            )


def _taken(types: str) -> tuple[str, bool]:
    """Return the one of several types that the command line takes, and whether the value can be `None`."""
    members = types.split(" | ")
    kept = [each for each in members if each != "None"]
    optional = len(kept) < len(members)
    if len(kept) > 1:
        kept = ["str"] if optional else [each for each in kept if each != "str"]
    return kept[0], optional


def _find_class(path: Path, name: str) -> tuple[Path, ast.ClassDef]:
    """Return the definition of a class that a module defines or imports, and the source with it."""
    for node in _statements(path):
        if isinstance(node, ast.ClassDef) and node.name == name:
            return path, node
        if isinstance(node, ast.ImportFrom) and name in {each.name for each in node.names}:
            return _find_class(_imported(path, node), name)
    raise LookupError(f"{path} has no class {name}.")


def _package_path(module: str) -> Path:
    """Return the source of a module of the library, such as `..lm.sites`."""
    return Path(__file__).parents[1].joinpath(*module.removeprefix("..").split(".")).with_suffix(".py")


def _listed(path: Path, name: str) -> list[str]:
    """Return the names that a module assigns to a variable or allows in the annotation of a field."""
    assigned = {ast.unparse(line.targets[0]): line.value for line in _statements(path) if isinstance(line, ast.Assign)}
    owner, _, field = name.partition(".")
    if field:
        path, definition = _find_class(path, owner)
        lines = [line for line in definition.body if isinstance(line, ast.AnnAssign)]
        node = {ast.unparse(line.target): line.annotation for line in lines}.get(field, ast.Constant(None))
        node = assigned.get(ast.unparse(node), node)
    else:
        node = assigned.get(name, ast.Constant(None))
    if isinstance(node, ast.Dict):
        node = ast.Tuple([key for key in node.keys if key is not None])
    for each in ast.walk(node):
        if isinstance(each, ast.Subscript) and ast.unparse(each.value) == "Literal":
            node = each.slice if isinstance(each.slice, ast.Tuple) else ast.Tuple([each.slice])
            break
    names = _value(node)
    if not isinstance(names, list | tuple):
        raise LookupError(f"{path} does not list {name}.")
    return list(names)


@functools.cache
def _statements(path: Path) -> list[ast.stmt]:
    return ast.parse(path.read_text(encoding="utf-8")).body


def _imported(path: Path, node: ast.ImportFrom) -> Path:
    """Return the source of the module that an import names."""
    package, *parts = (node.module or "__init__").split(".")
    if node.level:
        return path.parents[node.level - 1].joinpath(package, *parts).with_suffix(".py")
    # Finds a package without importing it.
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise LookupError(f"There is no package {package}.")
    return Path(spec.submodule_search_locations[0]).joinpath(*(parts or ["__init__"])).with_suffix(".py")


def _declared(path: Path, line: ast.AnnAssign) -> DeclaredField:
    value = line.value
    written = {word.arg: word.value for word in value.keywords} if isinstance(value, ast.Call) else {"default": value}
    metadata = written.get("metadata")
    options = {}
    if isinstance(metadata, ast.Dict):
        options = {_value(key): _value(value) for key, value in zip(metadata.keys, metadata.values, strict=True)}
        options = {key: value for key, value in options.items() if value is not UNKNOWN}
    types = ast.unparse(line.annotation)
    if choices := _enumerated(path, _taken(types)[0]):
        options["choices"] = choices
    return DeclaredField(types, _value(written.get("default")), options)


def _value(node: ast.expr | None) -> Any:
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError):
        return UNKNOWN


def _enumerated(path: Path, name: str) -> list | None:
    """Return the values of an enumeration that the module defines or imports."""
    if not name.isidentifier() or name in _TYPES or name in ("dict", "list"):
        return None
    try:
        _, definition = _find_class(path, name)
    except LookupError:
        return None
    if not definition.bases or not ast.unparse(definition.bases[0]).endswith("Enum"):
        return None
    return [_value(line.value) for line in definition.body if isinstance(line, ast.Assign)]
