"""The documentation names everything that is public, and its notebooks run."""

import importlib
import importlib.util
import pkgutil
import re
from pathlib import Path

import pytest

import hf_transcoders


ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "examples" / "notebooks").glob("*.ipynb"))


@pytest.fixture(scope="module")
def hooks():
    """The hooks of the site, which find what is on its pages."""
    pytest.importorskip("griffe")
    pytest.importorskip("mkdocs")
    spec = importlib.util.spec_from_file_location("docs_hooks", ROOT / "docs" / "hooks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def public_packages():
    """Every package of the library that says what is public."""
    found = pkgutil.walk_packages(hf_transcoders.__path__, "hf_transcoders.")
    names = ["hf_transcoders", *(name for _, name, is_package in found if is_package)]
    modules = (importlib.import_module(name) for name in names if ".cli" not in name)
    return [module for module in modules if getattr(module, "__all__", None)]


def test_every_public_name_is_on_a_page_of_the_api_reference(hooks):
    documented = set()
    for path in hooks.documented_names():
        package, _, name = path.rpartition(".")
        documented.add((name, id(getattr(importlib.import_module(package), name))))
    packages = public_packages()
    assert len(packages) > 15
    missing = [
        f"{package.__name__}.{name}"
        for package in packages
        for name in package.__all__
        if name != "__version__"
        and (name, id(getattr(package, name))) not in documented
        # Packages that a package lists are documented by their own names.
        and not hasattr(getattr(package, name), "__path__")
    ]
    assert not missing, f"add to a page of docs/api: {', '.join(missing)}"


def test_every_command_is_on_the_page_of_the_command_line(hooks):
    from hf_transcoders.cli.main import _COMMANDS

    commands = [[name] for name in _COMMANDS]
    commands += [[name, action] for name in _COMMANDS for action in hooks.actions(hooks.command_parser([name]))]
    assert len(commands) > 20
    assert sorted(hooks.documented_commands()) == sorted(commands)


def test_docstrings_become_tables(hooks):
    text = hooks.to_markdown(
        """
        What it does.

        Args:
            one (`int`, *optional*, defaults to 3):
                The first. See [`Foo`].
            two, three (`str | None`): The others.

        Returns:
            `int`: a number.
        """
    )
    assert "| `one` | `int`, *optional*, defaults to 3 | The first. See [`Foo`]. |" in text
    assert "| `two`, `three` | `str \\| None` | The others. |" in text
    assert "**Returns**\n\n`int`: a number." in text
    assert hooks.link_references("[`Foo`] and [`~torch.nn.Module`]", {"Foo": "x.Foo"}) == "[`Foo`][x.Foo] and `Module`"


def test_pages_and_pictures_that_are_linked_exist():
    pages = [
        *ROOT.glob("*.md"),
        *(ROOT / "docs").rglob("*.md"),
        *ROOT.glob("examples/*.md"),
        *ROOT.glob("benchmarks/*.md"),
    ]
    links = 0
    for page in pages:
        for target in re.findall(r"\]\(([^)\s#]+)[^)]*\)", page.read_text(encoding="utf-8")):
            if not re.match(r"[a-z]+:", target):
                links += 1
                assert (page.parent / target).exists(), f"{page.relative_to(ROOT)} links to {target}"
    assert links > 50


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_are_stored_without_outputs(path):
    nbformat = pytest.importorskip("nbformat")
    cells = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    assert cells and all(not cell.outputs and cell.execution_count is None for cell in cells)


@pytest.mark.slow
@pytest.mark.real_model
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_run(path, tmp_path, monkeypatch):
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    monkeypatch.setenv("MPLBACKEND", "agg")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    notebook = nbformat.read(path, as_version=4)
    nbclient.NotebookClient(
        notebook, timeout=1200, kernel_name="python3", resources={"metadata": {"path": tmp_path}}
    ).execute()
    printed = [cell.outputs for cell in notebook.cells if cell.cell_type == "code"]
    assert any(printed)
