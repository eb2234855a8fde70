"""An offline text source: English docstrings of the installed packages.

It is technical prose that needs no download and is the same for the same package versions. The packages are not imported;
their source files are parsed, and only the docstrings are read.
"""

import ast
import hashlib
import importlib.util
import inspect
import os
import re
import sysconfig
import warnings
from pathlib import Path

from ..errors import TranscoderError
from ..files import cache_folder


# Packages with enough prose to be worth parsing; those that are not installed are left out.
DOCSTRING_PACKAGES = (
    "stdlib",
    "torch",
    "transformers",
    "numpy",
    "sympy",
    "pandas",
    "networkx",
    "datasets",
    "huggingface_hub",
    "accelerate",
    "pydantic",
    "scipy",
    "sklearn",
    "matplotlib",
)

# Part of the cache key: increment it when the same files give other texts.
_VERSION = 1
_SKIPPED_FOLDERS = {"test", "tests", "site-packages", "dist-packages", "_vendor", "__pycache__"}
_STOP_WORDS = frozenset(
    "a an and are as at be by can for from has have if in is it not of on or that the this to was when which will with".split()
)
_FENCED_CODE = re.compile(r"^ *```.*?(?:^ *```|\Z)", re.MULTILINE | re.DOTALL)
_EXAMPLE_HEADING = re.compile(r"\s*(?:Examples?|Usage)\b.{0,3}(?:\n\s*[-=~]+)?")


def docstring_texts(*, min_chars=200, limit=None, packages=None):
    """
    Loads English docstrings of the installed packages as a dataset.

    Doctests, code blocks and tables are removed. A docstring is kept if the rest is long enough, is English, and consists
    mostly of new lines: if more than half of it was seen before, it is dropped, which removes exact copies and the thousands
    that differ only in a class name. Files are read in the order of a hash of their names, so that all parts of the result
    are similar, and the first `limit` texts are the same for any `limit`. The result is cached in the folder
    `HF_TRANSCODERS_CACHE` (`HF_HOME/hf_transcoders` if that is not set), under a key made of the names and sizes of the source
    files.

    Args:
        min_chars (`int`, *optional*, defaults to 200):
            Length of the shortest text to keep, in characters.
        limit (`int`, *optional*):
            Number of texts to load. By default all files are parsed, which takes up to a minute.
        packages (`Sequence[str]`, *optional*, defaults to `DOCSTRING_PACKAGES`):
            Import names of the packages to read; `"stdlib"` stands for Python's standard library. Those that are not
            installed are left out.

    Returns:
        [`~datasets.Dataset`] with one column, `text`.

    Raises:
        [`TranscoderError`]: No docstring was found.
    """
    from datasets import Dataset, Features, Value

    packages = DOCSTRING_PACKAGES if packages is None else tuple(packages)
    files = _source_files(packages)
    key = hashlib.sha256(repr((_VERSION, min_chars, limit)).encode())
    for name, path in files:
        key.update(f"{name} {path.stat().st_size}\n".encode())
    cache = str(cache_folder())

    # An empty cache would cause a less clear error, now and later.
    if next(_docstring_rows(files, min_chars, limit=1), None) is None:
        raise TranscoderError(
            f"No docstring of at least {min_chars} characters was found in the packages {', '.join(packages)}: name "
            "packages that are installed as Python source, or ask for fewer characters."
        )
    return Dataset.from_generator(
        _docstring_rows,
        features=Features({"text": Value("string")}),
        cache_dir=cache,
        gen_kwargs={"files": tuple(files), "min_chars": min_chars, "limit": limit},
        fingerprint=key.hexdigest()[:16],
    )


def _source_files(packages):
    """`(name, path)` of every source file, sorted by a hash, which mixes the packages independently of which exist."""
    files = {}
    for package in packages:
        if package == "stdlib":
            root = base = Path(sysconfig.get_path("stdlib"))
        else:
            # The spec of a top-level package is found without running it.
            spec = importlib.util.find_spec(package)
            if spec is None or not spec.submodule_search_locations:
                continue
            root = Path(spec.submodule_search_locations[0])
            base = root.parent
        for folder, subfolders, names in os.walk(root):
            subfolders[:] = [name for name in subfolders if name not in _SKIPPED_FOLDERS]
            for name in names:
                if name.endswith(".py"):
                    path = Path(folder, name)
                    files[path.relative_to(base).as_posix()] = path
    return sorted(files.items(), key=lambda item: hashlib.sha256(item[0].encode()).digest())


def _docstring_rows(files, min_chars, limit):
    seen_lines = set()
    found = 0
    for _, path in files:
        for docstring in _docstrings_of_file(path, min_chars):
            text = _prose(docstring)
            if len(text) < min_chars or not _is_english(text) or _is_repeated(text, seen_lines):
                continue
            yield {"text": text}
            found += 1
            if found == limit:
                return


def _docstrings_of_file(path, min_chars):
    source = path.read_bytes()
    # Parsing takes nearly all of the time.
    if b'"""' not in source and b"'''" not in source:
        return
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(source)
    except (SyntaxError, ValueError):  # templates and deliberately broken files
        return
    for scope in [tree, *_scopes(tree.body)]:
        docstring = ast.get_docstring(scope, clean=False)
        if docstring and len(docstring) >= min_chars:
            yield inspect.cleandoc(docstring)


def _scopes(body):
    """The classes and functions in a body, in source order, without visiting expressions."""
    for node in body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield node
            yield from _scopes(node.body)
        elif isinstance(node, ast.If | ast.Try | ast.With):
            for field in ("body", "orelse", "finalbody"):
                yield from _scopes(getattr(node, field, ()))


def _prose(docstring):
    """The paragraphs of prose, without code, tables and addresses."""
    kept = []
    for paragraph in re.split(r"\n\s*\n", _FENCED_CODE.sub("\n\n", docstring)):
        characters = "".join(paragraph.split())
        if ">>>" not in paragraph and sum(map(str.isalpha, characters)) >= 0.7 * max(1, len(characters)):
            kept.append(paragraph.rstrip())
        elif kept and _EXAMPLE_HEADING.fullmatch(kept[-1]):
            kept.pop()
    return "\n\n".join(kept).strip()


def _is_english(text):
    words = re.findall(r"[^\W\d_]+", text.lower())
    return sum(word in _STOP_WORDS for word in words) >= 0.12 * max(1, len(words))


def _is_repeated(text, seen_lines):
    """Whether most lines of a text were seen before; if not, its lines are added to the seen ones."""
    lines = [" ".join(re.findall(r"[a-z]+", line)) for line in text.lower().splitlines()]
    lines = [line for line in lines if len(line) >= 20]
    if 2 * sum(len(line) for line in lines if line in seen_lines) > sum(map(len, lines)):
        return True
    seen_lines.update(lines)
    return False
