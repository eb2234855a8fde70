import sys

import datasets
import pytest

from hf_transcoders.data import docstring_texts, load_texts
from hf_transcoders.errors import TranscoderError


PROSE = (
    "Open the window of the house and look at what is in the garden.\n\n"
    "The birds are on the roof, and it is a pleasure to hear them when the wind is not too strong for a song."
)
MODULE = f'''
"""{PROSE.replace("house", "palace").replace("birds", "crows")}"""

raise RuntimeError("a package that is read must never be run")


def first():
    """
    {PROSE.replace(chr(10), chr(10) + "    ")}

    Examples::

        >>> first()
        1

    ===== =====
    1.0   2.0
    ===== =====

    ```python
    print("the code of the example is not in the text")
    ```
    """


class Second:
    """{PROSE}"""

    async def nested(self):
        """Decide {"of the queue that is in the room and not on the table " * 5}"""


if True:

    def short():
        """Too short to keep."""


def foreign():
    """{"Der schnelle Fuchs springt über den faulen Hund und niemand sieht es kommen. " * 4}"""


def generated():
    """{PROSE.replace("Open the", "Close the")}"""
'''


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TRANSCODERS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")


@pytest.fixture
def package(tmp_path, monkeypatch):
    """An installed package that would raise if it were imported."""
    folder = tmp_path / "site" / "gardening"
    (folder / "tests").mkdir(parents=True)
    (folder / "__init__.py").write_text(MODULE)
    (folder / "broken.py").write_text('"""' + "The text of a file that is not Python. " * 9 + '"""\ndef (:')
    (folder / "tests" / "test_it.py").write_text('"""' + "The text of a test that is not prose to read. " * 9 + '"""')
    monkeypatch.syspath_prepend(tmp_path / "site")
    return folder


def test_prose_is_read_without_running_the_package(package, tmp_path):
    texts = docstring_texts(min_chars=150, packages=["gardening", "not_installed"])
    assert texts.column_names == ["text"]
    # Left out: the copies and near copies of the first function's text, the short one, the German one, the code, the
    # table, the tests and the file that does not parse.
    assert list(texts["text"]) == [
        PROSE.replace("house", "palace").replace("birds", "crows"),
        PROSE,
        "Decide " + ("of the queue that is in the room and not on the table " * 5).strip(),
    ]
    assert "gardening" not in sys.modules
    assert str(tmp_path / "cache") in texts.cache_files[0]["filename"]


def test_cache_follows_the_source(package):
    before = docstring_texts(min_chars=150, packages=["gardening"])
    again = docstring_texts(min_chars=150, packages=["gardening"])
    assert again.cache_files == before.cache_files
    (package / "more.py").write_text('"""' + "It is the text of a module that was added to the package. " * 5 + '"""')
    after = docstring_texts(min_chars=150, packages=["gardening"])
    assert after.cache_files != before.cache_files
    assert len(after) == len(before) + 1


def test_limit_takes_the_beginning():
    whole = list(docstring_texts(packages=["datasets", "evaluate"])["text"])
    assert len(whole) > 100
    assert len(set(whole)) == len(whole)
    assert min(map(len, whole)) >= 200
    assert not any(">>>" in text or "```" in text for text in whole)
    assert list(docstring_texts(packages=["datasets", "evaluate"], limit=20)["text"]) == whole[:20]
    # The order of one package's files does not depend on which others are installed.
    alone = list(docstring_texts(packages=["evaluate"])["text"])
    assert [text for text in whole if text in set(alone)] == [text for text in alone if text in set(whole)]


def test_source_of_load_texts():
    texts = load_texts("docstrings", limit=5)
    assert texts.column_names == ["text"] and len(texts) == 5
    assert [row["text"] for row in load_texts("docstrings", limit=5, streaming=True)] == list(texts["text"])


def test_nothing_found_is_refused(package):
    with pytest.raises(TranscoderError, match="at least 9000 characters was found in the packages gardening"):
        docstring_texts(min_chars=9000, packages=["gardening"])
    with pytest.raises(TranscoderError, match="was found in the packages not_installed"):
        docstring_texts(packages=["not_installed"])
