"""Hooks of the documentation site: render docstrings in Hugging Face format, the help of every command, and
pages that stand elsewhere in the repository.

`mkdocs.yml` loads this file twice: as a hook of MkDocs and, for [`HuggingFaceDocstrings`], as an extension of griffe.
"""

import argparse
import importlib
import inspect
import os
import re
import textwrap
from pathlib import Path

import griffe
from mkdocs.structure.files import File


ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "hf_transcoders"

# Pages of the repository that become pages of the site, under the same path.
REPOSITORY_PAGES = (
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "benchmarks/RESULTS.md",
    "examples/README.md",
    "model_cards/README.md",
)

_SECTIONS = {
    "Args": "Parameters",
    "Attributes": "Attributes",
    "Returns": "Returns",
    "Yields": "Yields",
    "Raises": "Raises",
    "Example": "Example",
    "Examples": "Examples",
}
_SECTION = re.compile(rf"({'|'.join(_SECTIONS)}):")
# `name (`type`, *optional*), other (`type`): text`, in which the types and the text may be missing.
_ONE = r"\*{0,2}\w+(?: \((?:[^()]|\([^()]*\))*\))?"
_ENTRY = re.compile(rf"({_ONE}(?:, {_ONE})*):(?: (.*)|$)")
_NAME_AND_TYPE = re.compile(r"(\*{0,2}\w+)(?: \(((?:[^()]|\([^()]*\))*)\))?")
_REFERENCE = re.compile(r"\[`(~?)([\w.]+)`\](?![(\[])")
_DOCUMENTED = re.compile(r"^::: (\S+)$", flags=re.MULTILINE)
_COMMAND = re.compile(r"^<!-- hf-transcoders (.+) -->$", flags=re.MULTILINE)
# Images stay: a missing one stops the build.
_LINK = re.compile(r"(?<!!)\[([^\[\]]+)\]\(([^)\s]+)\)")


# ------------------------------------------------------------------------------------------------ docstrings


def documented_names() -> list[str]:
    """The names, with the package that they are imported from, that have a place on a page of the API reference."""
    pages = sorted((ROOT / "docs" / "api").glob("*.md"))
    return [name for page in pages for name in _DOCUMENTED.findall(page.read_text(encoding="utf-8"))]


def link_references(text: str, targets: dict[str, str]) -> str:
    """
    Turn [`Foo`] and [`~package.Foo`] into links to the API reference, or into plain code where `Foo` is not on it.

    Args:
        text (`str`): Markdown.
        targets (`dict[str, str]`): Short name -> identifier on the API reference.
    """

    def link(found: re.Match) -> str:
        name = found[2]
        if name in targets:
            return f"[`{name}`][{targets[name]}]"
        last = name.rsplit(".", 1)[-1]
        # A full name inside this package, or one of another library.
        if name.startswith(f"{PACKAGE}.") and last in targets:
            return f"[`{last}`][{targets[last]}]"
        return f"`{last if found[1] else name}`"

    return _REFERENCE.sub(link, text)


def to_markdown(docstring: str) -> str:
    """
    A docstring in Hugging Face format as Markdown.

    Args:
        docstring (`str`): Text with `Args:`, `Returns:`, `Raises:` and `Example:` at the beginning of lines.

    Returns:
        `str`: The same with a heading for each section, and tables of parameters and attributes.
    """
    lines, parts = inspect.cleandoc(docstring).split("\n"), []
    while lines:
        line = lines.pop(0)
        section = _SECTION.fullmatch(line)
        if section is None:
            parts.append(line)
            continue
        body = []
        while lines and (not lines[0].strip() or lines[0].startswith(" ") or section[1].startswith("Example")):
            if _SECTION.fullmatch(lines[0]):
                break
            body.append(lines.pop(0))
        body = inspect.cleandoc("\n".join(["", *body])).split("\n")
        entries = _entries(body) if section[1] in ("Args", "Attributes") else None
        parts += ["", f"**{_SECTIONS[section[1]]}**", "", *(_table(entries) if entries else body), ""]
    return "\n".join(parts)


def _entries(lines: list[str]) -> list[tuple[str, str]] | None:
    """Heads and texts of the entries of a section; `None` where it is not made of entries."""
    entries: list[tuple[str, list[str]]] = []
    for line in lines:
        if line.startswith(" ") or not line.strip():
            if not entries:
                return None
            entries[-1][1].append(line)
        elif found := _ENTRY.match(line):
            entries.append((found[1], [found[2] or ""]))
        else:
            return None
    return [(head, " ".join(" ".join(text).split())) for head, text in entries]


def _table(entries: list[tuple[str, str]]) -> list[str]:
    rows = ["| Name | Type | Description |", "|---|---|---|"]
    for head, text in entries:
        names = _NAME_AND_TYPE.findall(head)
        types = dict.fromkeys(kind for _, kind in names if kind)
        cells = (", ".join(f"`{name}`" for name, _ in names), "; ".join(types), text)
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return rows


class HuggingFaceDocstrings(griffe.Extension):
    """Rewrites every docstring of the package as Markdown once it has been loaded."""

    def on_package(self, *, pkg: griffe.Module, **kwargs) -> None:
        names = documented_names()
        targets = {name.rsplit(".", 1)[-1]: name for name in names}
        for name in names:
            target = pkg[name.removeprefix(f"{PACKAGE}.")]
            if target.is_class:
                for member, value in target.members.items():
                    if not value.is_alias and not member.startswith("_") and value.has_docstring:
                        targets[f"{target.name}.{member}"] = f"{name}.{member}"
        _TARGETS.update(targets)
        self._rewrite(pkg, targets)

    def _rewrite(self, thing: griffe.Object, targets: dict[str, str]) -> None:
        if thing.docstring is not None:
            thing.docstring.value = link_references(to_markdown(thing.docstring.value), targets)
        for member in thing.members.values():
            if not member.is_alias:
                self._rewrite(member, targets)


# Filled when the package is loaded, which is before pages without API objects are needed.
_TARGETS: dict[str, str] = {}


# ------------------------------------------------------------------------------------------------ command line


class _Captured(Exception):
    pass


def command_parser(words: list[str]) -> argparse.ArgumentParser:
    """
    The parser of a command of `hf-transcoders`, without running it.

    Args:
        words (`list[str]`): The command and, where it has several, its action: `["circuits", "patch"]`.
    """

    def capture(parser, *args, **kwargs):
        raise _Captured(parser)

    command = importlib.import_module(f"{PACKAGE}.cli.{words[0]}")
    originals = argparse.ArgumentParser.parse_args, argparse.ArgumentParser.parse_known_args
    argparse.ArgumentParser.parse_args = argparse.ArgumentParser.parse_known_args = capture
    try:
        command.parse(words[1:], prog=f"hf-transcoders {words[0]}")
    except _Captured as captured:
        parser = captured.args[0]
    finally:
        argparse.ArgumentParser.parse_args, argparse.ArgumentParser.parse_known_args = originals
    for word in words[1:]:
        parser = actions(parser)[word]
    return parser


def actions(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """The parsers of a command's actions by their names, empty for a command without actions."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            return dict(action.choices)
    return {}


def documented_commands() -> list[list[str]]:
    """Commands and actions whose help is on the page of the command line."""
    return [words.split() for words in _COMMAND.findall((ROOT / "docs" / "cli.md").read_text(encoding="utf-8"))]


def _help(found: re.Match) -> str:
    # What the parser wraps lines to, whatever terminal the site is built in.
    os.environ["COLUMNS"] = "100"
    lines = command_parser(found[1].split()).format_help().rstrip().split("\n")
    # The parsers leave the lines of descriptions as they are.
    wrapped = [part for line in lines for part in (textwrap.wrap(line, 98) if line[:1].strip() else [line])]
    return "\n".join(["```text", *wrapped, "```"])


# ------------------------------------------------------------------------------------------------ pages


def on_files(files, config):
    """Add the pages that stand elsewhere in the repository."""
    for path in REPOSITORY_PAGES:
        files.append(File.generated(config, path, content=(ROOT / path).read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown, page, config, files):
    """Fill in help texts, link names of the library, and take away links to files that are not on the site."""
    if page.file.src_uri == "cli.md":
        return _COMMAND.sub(_help, markdown)
    names = {name.rsplit(".", 1)[-1]: name for name in documented_names()}
    return _LINK.sub(lambda found: _site_link(found, page, files), link_references(markdown, names))


def _site_link(found: re.Match, page, files) -> str:
    text, target = found[1], found[2]
    if re.match(r"[a-z]+:|#", target):
        return found[0]
    path, hash_sign, anchor = target.partition("#")
    # Where the link leads in the repository, in which pages of the site are those of `docs/`.
    page_folder = Path(page.file.src_uri).parent
    here = page_folder if page.file.src_uri in REPOSITORY_PAGES else Path("docs") / page_folder
    wanted = os.path.normpath(here / path).removeprefix("docs/")
    if files.get_file_from_path(wanted) is None:
        return text
    return f"[{text}]({os.path.relpath(wanted, page_folder)}{hash_sign}{anchor})"
