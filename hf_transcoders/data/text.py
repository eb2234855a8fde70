"""Load documents from the Hub, from local files, or from the offline source."""

import glob
import os
import re
from contextlib import contextmanager
from pathlib import Path

from ..errors import TranscoderError
from ..hub_ids import refuse_missing
from ..text.printable import printable
from .json_rows import json_columns, json_dataset, json_rows
from .offline_text import docstring_texts
from .text_files import check_files, files_of_folder, kind_of, suffixes
from .wikitext import is_wikitext, wikitext_articles


def load_texts(source, *, split="train", name=None, text_column=None, streaming=False, limit=None):
    """
    Load documents as a dataset with one column, `text`.

    Args:
        source (`str` or `os.PathLike`):
            Source of the documents:

            - `"docstrings"`: the English docstrings of the installed packages, which needs no network
              (see [`docstring_texts`]);
            - a local file, a folder, or a glob of `.txt`, `.jsonl`, `.json`, `.parquet` or `.csv` files, in UTF-8,
              compressed (`.jsonl.gz`) or not; an existing file takes precedence over a glob. In a `.txt` file the
              documents are the paragraphs between blank lines; a word-level WikiText file is split into its articles
              and detokenized;
            - the id of a dataset on the Hub, for [`~datasets.load_dataset`].
        split (`str`, *optional*, defaults to `"train"`):
            Split to load. Local files belong to `train`; in a folder, file names such as `test.txt` determine the split.
        name (`str`, *optional*):
            Configuration of a Hub dataset, such as `"wikitext-103-raw-v1"`.
        text_column (`str`, *optional*):
            Name of the column with the text. Defaults to `text`, or the only column of strings.
        streaming (`bool`, *optional*, defaults to `False`):
            Whether to read documents when they are needed, instead of downloading and converting all of them first.
        limit (`int`, *optional*):
            Number of documents to keep.

    Returns:
        [`~datasets.Dataset`], or [`~datasets.IterableDataset`] if `streaming`, with one column `text`. A tokenized dataset
        (with a column `input_ids`, and without `text_column`) keeps that column and its `attention_mask` instead.

    Raises:
        [`TranscoderError`]: the source does not exist, cannot be reached or read, is empty, or has no unambiguous column
            of text.
    """
    from datasets import load_dataset

    source = os.fspath(source)
    if limit is not None and limit < 1:
        raise TranscoderError(f"limit is {limit}, but it counts documents to keep: give at least 1, or leave it out.")
    if source == "docstrings":
        if split != "train":
            raise TranscoderError(f"The source 'docstrings' has no split {split!r}: use 'train' and split that.")
        dataset = docstring_texts(limit=limit)
        dataset.info.dataset_name = "docstrings of installed packages"
        return dataset.to_iterable_dataset() if streaming else dataset

    found = _local_files(source, name)
    if found is None:
        with _explained(source):
            dataset = load_dataset(source, name=name, split=split, streaming=streaming)
        dataset = _select_text(source, dataset, _first_row(source, dataset), text_column)
    else:
        kind, splits = found
        for files in splits.values():
            check_files(files, kind)
        read = _read_json if kind == "json" else _read_files
        dataset = read(source, kind, splits, split, text_column, streaming)
        # The name in reports and configurations: the file, not the name of the reader ("text") and not its folder.
        dataset.info.dataset_name = printable(os.path.basename(os.path.normpath(source)))
    if limit is None:
        return dataset
    return dataset.take(limit) if streaming else dataset.select(range(min(limit, len(dataset))))  # pyright: ignore[reportAttributeAccessIssue]


def hub_dataset_id(dataset):
    """
    Returns the Hub id that a dataset was downloaded from.

    Args:
        dataset ([`~datasets.Dataset`] or any other rows): Dataset, which may be packed and filtered.

    Returns:
        `str`, or `None` if it is not known: the dataset is local, streamed, or not a `datasets.Dataset`.
    """
    downloads = getattr(getattr(dataset, "info", None), "download_checksums", None) or {}
    for url in downloads:
        if found := re.match(r"hf://datasets/([^@]+)@", url):
            return found[1]
    return None


def _local_files(source, name):
    """The kind of the local files of a source, and split -> files; `None` for a dataset that `datasets` loads."""
    try:
        path = Path(source).expanduser()
    except RuntimeError as error:
        raise TranscoderError(f"There is no file {source!r}: {error}.") from error
    if path.is_dir():
        # A folder that describes its files, such as a copy of a dataset on the Hub, is loaded by `datasets`.
        if name is not None or _describes_itself(path):
            for file in path.rglob("*"):
                if kind_of(file) == "json" and file.is_file():
                    for _ in json_rows(file):
                        pass
            return None
        return files_of_folder(path)

    # An existing file takes precedence over a glob.
    files = [str(path)] if path.is_file() else sorted(glob.glob(str(path), recursive=True))
    if files:
        kinds = {kind_of(file) for file in files}
        if len(kinds) > 1 or None in kinds:
            raise TranscoderError(
                f"{source!r} is not one kind of text file: name {suffixes()} files, one kind at a time."
            )
        if not any(os.path.getsize(file) for file in files):
            raise TranscoderError(f"{source!r} is empty: give a file with text in it.")
        return kinds.pop(), {"train": files}

    if glob.has_magic(source):
        raise TranscoderError(f"There is no file {source!r}: check the path.")
    refuse_missing(
        source,
        "give a file or folder with text, the id of a Hub dataset, or 'docstrings', which needs no network",
        what="file or folder",
        repo_type="dataset",
    )
    return None


def _describes_itself(folder):
    try:
        start = (folder / "README.md").read_text(encoding="utf-8", errors="replace")[:100_000]
    except OSError:
        return False
    return re.match(r"---\s*\n(?:.*\n)*?configs:", start) is not None


def _read_files(source, kind, splits, split, text_column, streaming):
    """Text, Parquet and CSV files, read by `datasets`."""
    from datasets import load_dataset

    # A byte order mark is not part of the text. Pandas takes the first columns of rows with too many values as an index,
    # which shifts all others.
    options = {
        "text": {"sample_by": "paragraph", "encoding": "utf-8-sig"},
        "csv": {"encoding": "utf-8-sig", "index_col": False},
        "parquet": {},
    }[kind]
    escaped = {name: [glob.escape(file) for file in files] for name, files in splits.items()}
    with _explained(source, local=True):
        dataset = load_dataset(kind, data_files=escaped, split=split, streaming=streaming, **options)
    first = _first_row(source, dataset)
    if kind != "text":
        return _select_text(source, dataset, first, text_column)
    # Lines are joined again, so that WikiText articles are complete.
    dataset = dataset.map(
        _split_documents, batched=True, **({} if streaming else {"desc": "Splitting into documents"})
    )
    _first_row(source, dataset)
    return dataset


def _read_json(source, kind, splits, split, text_column, streaming):
    from datasets import ReadInstruction

    with _explained(source, local=True):
        # A split may be a slice, such as `train[:10%]`.
        asked = ReadInstruction.from_spec(split)
        names = {part.splitname for part in asked.to_absolute(dict.fromkeys(splits, 1))}
        if len(names) > 1 or (streaming and split not in splits):
            raise ValueError(f"the split {split!r} is not one of {', '.join(splits)}")
        (name,) = names
        columns = json_columns(splits[name])
    strings = [column for column, is_text in columns.items() if is_text]
    if not columns:
        raise TranscoderError(f"{source!r} has no documents in it: give a source with text, or another split.")
    column = _text_column(source, list(columns), strings, text_column)
    with _explained(source, local=True):
        dataset = json_dataset(splits[name], column, streaming, name)
    _first_row(source, dataset)
    if streaming or split == name:
        return dataset
    rows = [
        row for part in asked.to_absolute({name: len(dataset)}) for row in range(len(dataset))[part.from_ : part.to]
    ]
    return dataset.select(rows)  # pyright: ignore[reportAttributeAccessIssue]


def _first_row(source, dataset):
    """The first row. A stream opens its files here, so errors and empty files are found here too."""
    with _explained(source, local=os.path.exists(source)):
        first = next(iter(dataset), None)
    if first is None:
        raise TranscoderError(f"{source!r} has no documents in it: give a source with text, or another split.")
    return first


@contextmanager
def _explained(source, local=False):
    """Turn errors of `datasets` for a missing or unreadable source into one sentence."""
    try:
        yield
    except Exception as error:
        # The error of the builder has no reason. Readers of damaged files raise many kinds of errors.
        cause = error.__cause__ or error
        reason = printable(str(cause).strip().split("\n")[0].rstrip(".")[:300]) or "nothing in it could be read"
        advice = (
            "check that the files are whole and the split is one of theirs"
            if local
            else "check the name, the split, the configuration and the network, or use 'docstrings', which needs none"
        )
        raise TranscoderError(f"Could not load text from {source!r} ({reason}): {advice}.") from error


def _select_text(source, dataset, first, text_column):
    columns = dataset.column_names or list(first)
    if text_column is None and "input_ids" in columns:
        return dataset.select_columns([name for name in ("input_ids", "attention_mask") if name in columns])
    # Every access makes a copy of the features.
    features = dataset.features
    if features is None:
        # The features of a stream may be unknown before it is read.
        strings = [column for column in columns if isinstance(first[column], str)]
    else:
        strings = [
            column for column in columns if getattr(features[column], "dtype", None) in ("string", "large_string")
        ]
    column = _text_column(source, columns, strings, text_column)
    dataset = dataset.select_columns(column)
    return dataset if column in ("text", "input_ids") else dataset.rename_column(column, "text")


def _text_column(source, columns, strings, text_column):
    """The name of the column with the text or the token ids."""
    if text_column is None:
        if "input_ids" in columns:
            return "input_ids"
        if "text" not in strings and len(strings) != 1:
            raise TranscoderError(
                f"{source!r} has the columns {_listed(columns)}, of which {_listed(strings) or 'none'} hold strings: name the "
                "one with the text by text_column."
            )
        return "text" if "text" in strings else strings[0]
    if text_column not in strings:
        raise TranscoderError(
            f"{source!r} has no column {text_column!r} of strings: its columns are {_listed(columns)}, of which "
            f"{_listed(strings) or 'none'} hold strings."
        )
    return text_column


def _listed(columns, most=12):
    if not columns:
        return ""
    return str(columns[:most])[:600] + (f" and {len(columns) - most} more" if len(columns) > most else "")


def _split_documents(batch):
    documents = []
    for text in batch["text"]:
        documents += wikitext_articles(text) if is_wikitext(text) else re.split(r"\n\s*\n", text)
    return {"text": [document.strip() for document in documents if document.strip()]}
