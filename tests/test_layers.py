"""Layers of the package: imports point down, files import each other without circles, and file names are unique."""

import ast
import itertools
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest

import hf_transcoders


ROOT = Path(hf_transcoders.__file__).parent

# A layer imports only from those above it in this list. Packages of one layer do not import each other.
LAYERS = [
    {"errors"},
    {"text", "version"},
    {"files", "fingerprint", "hub_ids"},
    {"ops", "formats"},
    {"models", "lm"},
    {"dictionaries"},
    {"data", "tasks"},
    {"features"},
    {"evaluation"},
    {"reports"},
    {"tracking", "hub"},
    {"circuits"},
    {"studies", "training"},
    {"testing"},
    {"cli"},
]
LEVEL = {package: level for level, packages in enumerate(LAYERS) for package in packages}
# Imports against this order, by file and package. Inside functions: `push_to_hub` is a method of models in transformers.
ALLOWED_IN_FUNCTIONS = {
    ("models/publishing.py", "hub"),
    # Sideways: dictionaries that were trained after a folded norm are converted with the norm of the language model.
    ("models/foreign.py", "lm"),
}
# Within one layer, where one package is the basis of another.
ALLOWED_SIDEWAYS = {("hub", "tracking"), ("tasks", "data")}
# Circles that only type checkers follow.
TYPE_CIRCLES = [
    {f"studies/circuit_reuse/{name}.py" for name in ("reuse_results", "reuse_tables")},
    # A graph with methods that write it; the files that write take it as an argument.
    {
        f"circuits/graphs/{name}.py"
        for name in ("graph", "graph_card", "node_ids", "page_data", "page_labels", "verdicts", "viewer")
    },
    {
        f"models/{name}.py"
        for name in (
            "activations",
            "folding",
            "foreign",
            "modeling_transcoder",
            "named_dictionaries",
            "publishing",
            "saved_model",
            "transcoder_set",
            "cross_layer/from_set",
            "cross_layer/modeling_cross_layer",
            "cross_layer/source",
        )
    },  # fmt: skip
    {f"studies/circuit_reuse/{name}.py" for name in ("found_repair", "repair_tables")},
    {f"testing/local_hub/{name}.py" for name in ("connection", "routes", "server")},
]
# File names that several packages may use for different things: a package's door, and the entry of a study or a command.
SHARED_NAMES = {"__init__.py", "study.py"}


@dataclass(frozen=True)
class Import:
    """An import of one file of the package by another."""

    file: str
    target: str
    in_function: bool
    for_types: bool


def files() -> list[str]:
    return sorted(path.relative_to(ROOT).as_posix() for path in ROOT.rglob("*.py"))


def package_of(file: str) -> str:
    """The package of the first level that a file belongs to, or the module that it is."""
    return file.partition("/")[0].removesuffix(".py")


def imports_of(file: str, text: str | None = None, known: list[str] | None = None) -> list[Import]:
    """The imports by one file of other files of the package."""
    known = files() if known is None else known
    package = file.split("/")[:-1]
    found = []

    def target_of(parts: list[str]) -> str | None:
        for path in ("/".join(parts) + ".py", "/".join([*parts, "__init__.py"])):
            if path in known:
                return path
        return None

    def visit(node, in_function=False, for_types=False):
        if isinstance(node, ast.ImportFrom):
            if node.level:
                base = package[: len(package) - (node.level - 1)]
            elif (node.module or "").split(".")[0] == ROOT.name:
                base = []
            else:
                return
            module = (node.module or "").split(".") if node.module else []
            module = base + (module if node.level else module[1:])
            for alias in node.names:
                target = target_of([*module, alias.name]) or target_of(module)
                if target is not None and target != file:
                    found.append(Import(file, target, in_function, for_types))
            return
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            for_types = True
        in_function = in_function or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            visit(child, in_function, for_types)

    visit(ast.parse((ROOT / file).read_text(encoding="utf-8") if text is None else text))
    return list(dict.fromkeys(found))


def all_imports() -> list[Import]:
    known = files()
    return [found for file in known for found in imports_of(file, known=known)]


def upward(imports: list[Import]) -> list[str]:
    """Imports against the order of the layers that are not allowed."""
    wrong = []
    for each in imports:
        importer, imported = package_of(each.file), package_of(each.target)
        if importer == imported or importer not in LEVEL or imported not in LEVEL:
            continue
        if LEVEL[imported] < LEVEL[importer] or (importer, imported) in ALLOWED_SIDEWAYS:
            continue
        if (each.file, imported) in ALLOWED_IN_FUNCTIONS and each.in_function:
            continue
        where = "inside a function" if each.in_function else "at module level"
        wrong.append(f"{each.file} imports {each.target} {where}")
    return wrong


def circles(imports: list[Import]) -> list[set[str]]:
    """Groups of files that import each other (the strongly connected components of more than one file)."""
    targets = {}
    for each in imports:
        targets.setdefault(each.file, set()).add(each.target)

    def reached(start):
        seen, pending = set(), [start]
        while pending:
            for target in targets.get(pending.pop(), ()):
                if target not in seen:
                    seen.add(target)
                    pending.append(target)
        return seen

    reach = {file: reached(file) for file in targets}
    found = {frozenset(other for other in reach[file] if file in reach.get(other, ())) for file in reach}
    return sorted((set(group) for group in found if len(group) > 1), key=sorted)


def without_conveniences(imports: list[Import]) -> list[Import]:
    """Imports without those inside functions that are allowed to point up."""
    return [
        each
        for each in imports
        if not (each.in_function and (each.file, package_of(each.target)) in ALLOWED_IN_FUNCTIONS)
    ]


def test_every_package_has_a_layer():
    packages = {path.name for path in ROOT.iterdir() if (path / "__init__.py").exists()}
    assert packages <= LEVEL.keys()


def test_imports_point_down():
    found = all_imports()
    assert len(found) > 500
    assert not (wrong := upward(found)), "\n".join(wrong)


def test_the_allowed_imports_exist():
    used = {(each.file, package_of(each.target)) for each in all_imports() if each.in_function}
    assert used >= ALLOWED_IN_FUNCTIONS


def test_files_do_not_import_each_other_in_circles():
    assert circles([each for each in without_conveniences(all_imports()) if not each.for_types]) == []


def test_circles_of_types_are_listed():
    found = circles(without_conveniences(all_imports()))
    assert not (other := [group for group in found if not any(group <= listed for listed in TYPE_CIRCLES)]), other


def test_file_names_are_unique():
    names = Counter(
        Path(file).name for file in files() if package_of(file) != "cli" and Path(file).name not in SHARED_NAMES
    )
    assert not (twice := [name for name, count in names.items() if count > 1]), twice


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("models/folding.py", "def f():\n    from ..hub.upload import push", "inside a function"),
        ("models/publishing.py", "from ..hub.upload import push", "at module level"),
        (
            "models/publishing.py",
            "def f():\n    from ..training.trainer import TranscoderTrainer",
            "inside a function",
        ),
        ("evaluation/drift.py", "from hf_transcoders.hub import push", "at module level"),
        ("tracking/run.py", "from .. import evaluation, training", "training"),
    ],
)
def test_an_upward_import_is_found(file, text, message):
    (wrong,) = upward(imports_of(file, text))
    assert message in wrong


def test_an_allowed_import_is_accepted():
    assert upward(imports_of("models/publishing.py", "def f():\n    from ..hub.upload import push")) == []


def test_a_circle_is_found():
    pairs = itertools.pairwise(["a.py", "b.py", "c.py", "a.py", "d.py"])
    assert circles([Import(file, target, True, False) for file, target in pairs]) == [{"a.py", "b.py", "c.py"}]
