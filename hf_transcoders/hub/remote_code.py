"""Join the model's code into two self-contained files, for `AutoModel` where this package is not installed.

In addition to a repo's `config.json`, transformers fetches only the files named in its `auto_map` and their siblings. So the
modules of the model are joined into one file when it is saved, from the source that is running: there is no second copy
to maintain.
"""

import ast
import functools
import json
import os
from collections.abc import Collection, Set
from pathlib import Path

from ..errors import TranscoderError
from ..files import write_text
from ..models.cross_layer.configuration_cross_layer import CrossLayerTranscoderConfig


CONFIGURATION_FILE, MODELING_FILE = "configuration_transcoder.py", "modeling_transcoder.py"
CODE_FILES = (CONFIGURATION_FILE, MODELING_FILE)
AUTO_MAP = {
    "AutoConfig": "configuration_transcoder.TranscoderConfig",
    "AutoModel": "modeling_transcoder.TranscoderModel",
}

_PACKAGE = Path(__file__).parent.parent
_NAME = _PACKAGE.name
_HEAD = '''"""{what} of hf_transcoders {version}, joined into one file for AutoModel.from_pretrained(..., trust_remote_code=True).

Written by `save_pretrained(..., remote_code=True)`. Apache-2.0, the hf_transcoders authors.
"""

'''


def write_remote_code(folder: str | os.PathLike) -> None:
    """
    Adds the model's code to a saved dictionary or set, so that it loads without this package.

    Args:
        folder (`str` or `os.PathLike`): Folder of the dictionary or set; the `config.json` of each dictionary names the code.
    """
    configs = list(Path(folder).rglob("config.json"))
    for config in configs:
        values = json.loads(config.read_text(encoding="utf-8"))
        if values.get("model_type") == CrossLayerTranscoderConfig.model_type:
            raise TranscoderError(
                "The code of cross-layer transcoders is not published with them: leave `remote_code` out, and load them where "
                "hf_transcoders is installed."
            )
        values |= {"auto_map": AUTO_MAP}
        write_text(config, json.dumps(values, indent=2, sort_keys=True) + "\n")
    # For a sub-folder of a repo, transformers looks for code at the top.
    for place in {Path(folder), *(config.parent for config in configs)}:
        for name, source in remote_code_files().items():
            write_text(place / name, source)


@functools.cache
def remote_code_files() -> dict[str, str]:
    """
    Joins the modules of this package into the files.

    Returns:
        `dict[str, str]`: File name -> source, which imports nothing of this package.
    """
    from ..version import __version__

    configuration = _order(f"{_NAME}.models.configuration_transcoder")
    modeling = _order(f"{_NAME}.models.modeling_transcoder")
    first = _join(configuration, "TranscoderConfig")
    shared = {name for statement in ast.parse(first).body for name in _defined(statement)}
    second = _join(modeling, "TranscoderModel", configuration, shared)
    return {
        CONFIGURATION_FILE: _HEAD.format(what="The configuration", version=__version__) + first,
        MODELING_FILE: _HEAD.format(what="The model", version=__version__) + second,
    }


# ---------------------------------------------------------------------------------------------------- which modules


def _path(module: str) -> Path | None:
    base = _PACKAGE.joinpath(*module.split(".")[1:])
    return next((path for path in (base.with_suffix(".py"), base / "__init__.py") if path.is_file()), None)


def _origin(node: ast.ImportFrom, module: str) -> str:
    """The full name of the module in a `from ... import` statement of `module`."""
    parts = module.split(".")
    package = parts if _path(module).name == "__init__.py" else parts[:-1]
    base = package[: len(package) - node.level + 1]
    return ".".join([*base, node.module] if node.module else base)


def _imported_modules(node: ast.ImportFrom, module: str) -> list[str]:
    origin = _origin(node, module)
    submodules = [f"{origin}.{alias.name}" for alias in node.names if _is_module(node, alias, module)]
    return submodules if node.module is None else [origin]


def _is_module(node: ast.ImportFrom, alias: ast.alias, module: str) -> bool:
    return node.module is None and _path(f"{_origin(node, module)}.{alias.name}") is not None


def _order(module: str, found: list[str] | None = None) -> list[str]:
    """`module` and all modules of this package that it imports, each after its own imports."""
    found = [] if found is None else found
    for statement in ast.parse(_path(module).read_text(encoding="utf-8")).body:
        if isinstance(statement, ast.ImportFrom) and statement.level:
            for needed in _imported_modules(statement, module):
                if needed not in found:
                    _order(needed, found)
    if module not in found:
        found.append(module)
    return found


# ---------------------------------------------------------------------------------------------------- one file of them


def _join(modules: list[str], wanted: str, joined: Collection[str] = (), outside: Set[str] = frozenset()) -> str:
    """
    Joins the statements of several modules that a class needs, after the imports that they need.

    Args:
        modules (`list[str]`): Names of the modules, each after its own imports.
        wanted (`str`): Name of the class.
        joined (`Collection[str]`, *optional*): Names of the modules that the configuration's file was made from.
        outside (`Set[str]`, *optional*): Names that the configuration's file defines.
    """
    statements, imports = [], {}
    for module in modules:
        source = _without_package_imports(module)
        lines = source.splitlines(keepends=True)
        body = ast.parse(source).body
        end = body[0].end_lineno if body and _is_docstring(body[0]) else 0
        for statement in body[1:] if end else body:
            begin = end
            end = statement.end_lineno
            if isinstance(statement, ast.Import | ast.ImportFrom):
                for alias in statement.names:
                    imports[alias.asname or alias.name.split(".")[0]] = (statement, alias)
                continue
            if module in joined and not _defined(statement) - outside:
                continue
            # Including the comments above it.
            text = "".join(lines[begin:end]).strip("\n")
            statements.append((statement, text))
    lazily_annotated = imports.pop("annotations", None) is not None
    _refuse_double_names(statements)
    kept = _needed(statements, wanted)
    used = set().union(*(_used(statement) for statement, _ in kept))
    head = sorted({_import_line(*imports[name]) for name in used & imports.keys()}, key=_import_order)
    if shared := sorted(used & outside - imports.keys() - {n for s, _ in kept for n in _defined(s)}):
        head += ["", f"from .{CONFIGURATION_FILE.removesuffix('.py')} import {', '.join(shared)}"]
    source = "from __future__ import annotations\n\n" if lazily_annotated else ""
    source += "\n".join(head) + "\n\n\n" + "\n\n\n".join(text for _, text in kept) + "\n"
    compile(source, f"<{wanted}>", "exec")
    return source


def _without_package_imports(module: str) -> str:
    """The source of a module without imports of this package and methods that publish."""
    source = _path(module).read_text(encoding="utf-8")
    tree = ast.parse(source)
    # Replacements of (line, column) ranges, columns in bytes as `ast` counts them.
    cuts: list[tuple[tuple[int, int], tuple[int, int], str]] = []
    aliases = set()

    def visit(node):
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            cuts.append(_lines(node))
        elif isinstance(node, ast.ImportFrom) and node.level:
            aliases.update(alias.name for alias in node.names if _is_module(node, alias, module))
            cuts.append(_lines(node))
        elif isinstance(node, ast.FunctionDef) and _stays_with_package(node, module):
            # Pushing and other formats need the package; without it, the class has the methods of `PreTrainedModel`.
            cuts.append(_lines(node))
        else:
            for child in ast.iter_child_nodes(node):
                visit(child)

    visit(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in aliases:
            cuts.append(((node.lineno, node.col_offset), (node.end_lineno, node.end_col_offset), node.attr))
    lines = source.encode().splitlines(keepends=True)
    for (first, begin), (last, end), text in sorted(cuts, reverse=True):
        lines[first - 1 : last] = [lines[first - 1][:begin] + text.encode() + lines[last - 1][end:]]
    return b"".join(lines).decode()


def _lines(node) -> tuple[tuple[int, int], tuple[int, int], str]:
    first = min([node.lineno, *(decorator.lineno for decorator in getattr(node, "decorator_list", []))])
    return (first, 0), (node.end_lineno, node.end_col_offset), ""


def _stays_with_package(function: ast.FunctionDef, module: str) -> bool:
    """Whether a method publishes, or reads the formats of other libraries."""
    rooms = (f"{_NAME}.hub", f"{_NAME}.models.foreign")
    return any(
        isinstance(node, ast.ImportFrom) and node.level and _origin(node, module).startswith(rooms)
        for node in ast.walk(function)
    )


def _is_docstring(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)


def _defined(statement: ast.stmt) -> set[str]:
    if isinstance(statement, ast.FunctionDef | ast.ClassDef):
        return {statement.name}
    if isinstance(statement, ast.Assign | ast.AnnAssign):
        return {n.id for n in ast.walk(statement) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    return set()


def _used(statement: ast.stmt) -> set[str]:
    return {node.id for node in ast.walk(statement) if isinstance(node, ast.Name)}


def _refuse_double_names(statements) -> None:
    seen: set[str] = set()
    for statement, _ in statements:
        if twice := _defined(statement) & seen:
            raise TranscoderError(
                f"{', '.join(twice)} is defined in two modules, which then cannot be joined into one file: rename one."
            )
        seen |= _defined(statement)


def _needed(statements, wanted: str):
    """The statements that define `wanted` and the names it needs, and those that are run for their effect only."""
    kept = [
        i for i, (statement, _) in enumerate(statements) if wanted in _defined(statement) or not _defined(statement)
    ]
    for i in kept:
        names = _used(statements[i][0])
        kept += [j for j, (other, _) in enumerate(statements) if _defined(other) & names and j not in kept]
    return [statements[i] for i in sorted(kept)]


def _import_line(statement: ast.Import | ast.ImportFrom, alias: ast.alias) -> str:
    name = alias.name + (f" as {alias.asname}" if alias.asname else "")
    return f"from {statement.module} import {name}" if isinstance(statement, ast.ImportFrom) else f"import {name}"


def _import_order(line: str) -> tuple[bool, str]:
    return line.startswith("from"), line
