"""Every package that is imported is declared in pyproject.toml."""

import ast
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import hf_transcoders


PACKAGE = Path(hf_transcoders.__file__).parent
ROOT = PACKAGE.parent
# Imported only for what users bring along: models of peft, and pictures for tensorboard.
OF_USERS = {"peft", "PIL"}


def declared(*extras: str) -> set[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [
        *project["dependencies"],
        *(each for extra in extras for each in project["optional-dependencies"][extra]),
    ]
    return {normal(each) for each in wanted}


def normal(requirement: str) -> str:
    name = requirement
    for mark in "<>=!~;[ ":
        name = name.partition(mark)[0]
    return name.lower().replace("_", "-")


def imported(folder: Path) -> dict[str, set[str]]:
    """Package of the first level -> files that import it."""
    found = {}
    for path in folder.rglob("*.py"):
        # These run with other libraries, each in an environment of its own.
        if "interop" in path.parts:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module]
            for name in names:
                found.setdefault(name.partition(".")[0], set()).add(path.relative_to(ROOT).as_posix())
    return found


def undeclared(folder: Path, known: set[str]) -> dict[str, set[str]]:
    distributions = packages_distributions()
    own = {*sys.stdlib_module_names, "hf_transcoders", "tests", *(path.stem for path in folder.rglob("*.py"))}
    return {
        name: files
        for name, files in imported(folder).items()
        if name not in own | OF_USERS and not known & {normal(each) for each in distributions.get(name, [name])}
    }


def test_imports_of_the_package_are_declared():
    assert len(imported(PACKAGE)) > 30
    assert undeclared(PACKAGE, declared("gguf", "ica", "kernels", "trackio", "plots")) == {}


def test_imports_of_tests_examples_and_benchmarks_are_declared():
    known = declared("dev", "docs", "gguf", "ica", "kernels", "trackio", "plots")
    assert undeclared(ROOT / "tests", known) == {}
    assert undeclared(ROOT / "examples", known) == {}
    assert undeclared(ROOT / "benchmarks", known) == {}
