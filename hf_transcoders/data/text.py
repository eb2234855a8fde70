"""Documents from the Hub, from local files, or from the offline source, in one column `text`."""

import glob
import os
import re
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

from ..errors import TranscoderError
from .offline_text import docstring_texts
from .wikitext import is_wikitext, wikitext_articles


_BUILDERS = {".txt": "text", ".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv"}


def load_texts(source, *, split="train", name=None, text_column=None, streaming=False, limit=None):
    """
    Load documents as a dataset with one column, `text`.

    Args:
        source (`str` or `os.PathLike`):
            One of:

            - `"docstrings"`: the English docstrings of the installed packages, which needs no network
              (see [`docstring_texts`]);
            - a local file, a folder, or a glob of `.txt`, `.jsonl`, `.json`, `.parquet` or `.csv` files. In a `.txt`
              file the documents are the paragraphs between blank lines; a word-level WikiText file becomes its
              articles, detokenized;
            - the id of a dataset on the Hub, given to [`~datasets.load_dataset`].
        split (`str`, *optional*, defaults to `"train"`):
            Split to load. Local files are all of the split `train`; in a folder, file names such as `test.txt` tell.
        name (`str`, *optional*):
            Configuration of a Hub dataset, such as `"wikitext-103-raw-v1"`.
        text_column (`str`, *optional*):
            Column that holds the text. By default `text`, or else the only column of strings.
        streaming (`bool`, *optional*, defaults to `False`):
            Read the documents as they are needed, instead of downloading and converting all of them first.
        limit (`int`, *optional*):
            Keep the first `limit` documents.

    Returns:
        [`~datasets.Dataset`], or [`~datasets.IterableDataset`] if `streaming`, with one column `text`. A dataset that
        is already tokenized (it has a column `input_ids`, and no `text_column` was asked for) keeps that one instead, and
        its `attention_mask`.

    Raises:
        [`TranscoderError`]: The source does not exist, cannot be reached or read, is empty, or has no column of text
            that can be told from the others.
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

    arguments, is_plain_text = _load_arguments(source)
    with _explained(source):
        dataset = load_dataset(**arguments, name=name, split=split, streaming=streaming)
    first = _first_row(source, dataset)
    if is_plain_text:
        # Lines are put together again here, so that a WikiText article is seen as a whole.
        dataset = dataset.map(
            _split_documents, batched=True, **({} if streaming else {"desc": "Splitting into documents"})
        )
        _first_row(source, dataset)
    else:
        dataset = _select_text(source, dataset, first, text_column)
    if arguments["path"] != source:
        # What reports and configurations call it: the file, not the reader's name ("text") and not its folder.
        dataset.info.dataset_name = os.path.basename(os.path.normpath(source))
    if limit is None:
        return dataset
    return dataset.take(limit) if streaming else dataset.select(range(min(limit, len(dataset))))


def hub_dataset_id(dataset):
    """
    The id on the Hub that a dataset was downloaded from.

    Args:
        dataset ([`~datasets.Dataset`] or any other rows): What is asked about; packed and filtered ones still know it.

    Returns:
        `str`, or `None` where the dataset does not say: it is local, streamed, or no `datasets.Dataset`.
    """
    downloads = getattr(getattr(dataset, "info", None), "download_checksums", None) or {}
    for url in downloads:
        if found := re.match(r"hf://datasets/([^@]+)@", url):
            return found[1]
    return None


def _load_arguments(source):
    """The arguments of `load_dataset`, and whether they read plain text files."""
    path = Path(source).expanduser()
    if path.is_dir():
        kinds = Counter(_BUILDERS[file.suffix] for file in path.rglob("*") if file.suffix in _BUILDERS)
        if not kinds:
            raise TranscoderError(f"The folder {source!r} holds no {_suffixes()} file: name a folder that does.")
        # load_dataset also reads the most common kind, and finds the splits by the names of the files.
        kind = kinds.most_common(1)[0][0]
        return {"path": str(path)} | _reader_options(kind), kind == "text"

    files = [str(path)] if path.is_file() else sorted(glob.glob(str(path), recursive=True))
    if files:
        kinds = {_BUILDERS.get(Path(file).suffix) for file in files}
        if len(kinds) > 1 or None in kinds:
            raise TranscoderError(
                f"{source!r} is not one kind of text file: name {_suffixes()} files, one kind at a time."
            )
        if not any(Path(file).stat().st_size for file in files):
            raise TranscoderError(f"{source!r} is empty: give a file with text in it.")
        kind = kinds.pop()
        return {"path": kind, "data_files": files} | _reader_options(kind), kind == "text"

    if path.suffix in _BUILDERS or source.startswith((".", "/", "~")) or glob.has_magic(source):
        raise TranscoderError(f"There is no file {source!r}: check the path.")
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", source):
        raise TranscoderError(
            f"{source!r} is neither a file nor the id of a Hub dataset: give a path, an id such as 'user/dataset', or "
            "'docstrings' for the offline source."
        )
    return {"path": source}, False


def _reader_options(kind):
    return {"sample_by": "paragraph"} if kind == "text" else {}


def _suffixes():
    return ", ".join(_BUILDERS)


def _first_row(source, dataset):
    """The first row; a stream opens its files here, so their errors and their emptiness show here too."""
    with _explained(source):
        first = next(iter(dataset), None)
    if first is None:
        raise TranscoderError(f"{source!r} has no documents in it: give a source with text, or another split.")
    return first


@contextmanager
def _explained(source):
    """Turn what `datasets` raises for a source that it cannot find or read into one sentence."""
    from datasets.exceptions import DatasetsError

    try:
        yield
    except (OSError, ValueError, RuntimeError, StopIteration, DatasetsError) as error:
        # The builder's own error only says that there was one.
        reason = str(error.__cause__ or error).strip().split("\n")[0].rstrip(".") or "nothing in it could be read"
        raise TranscoderError(
            f"Could not load text from {source!r} ({reason}): check the name, the split, the configuration and the "
            "network, or use 'docstrings', which needs none."
        ) from error


def _select_text(source, dataset, first, text_column):
    columns = dataset.column_names or list(first)
    if text_column is None and "input_ids" in columns:
        return dataset.select_columns([name for name in ("input_ids", "attention_mask") if name in columns])
    strings = [column for column in columns if _is_text(dataset, first, column)]
    if text_column is None:
        if "text" not in strings and len(strings) != 1:
            raise TranscoderError(
                f"{source!r} has the columns {columns}, of which {strings or 'none'} hold strings: name the one with "
                "the text by text_column."
            )
        text_column = "text" if "text" in strings else strings[0]
    elif text_column not in strings:
        raise TranscoderError(
            f"{source!r} has no column {text_column!r} of strings: its columns are {columns}, of which "
            f"{strings or 'none'} hold strings."
        )
    dataset = dataset.select_columns(text_column)
    return dataset if text_column == "text" else dataset.rename_column(text_column, "text")


def _is_text(dataset, first, column):
    # A stream may not know its features before it is read.
    if dataset.features is None:
        return isinstance(first[column], str)
    return getattr(dataset.features[column], "dtype", None) in ("string", "large_string")


def _split_documents(batch):
    documents = []
    for text in batch["text"]:
        documents += wikitext_articles(text) if is_wikitext(text) else re.split(r"\n\s*\n", text)
    return {"text": [document.strip() for document in documents if document.strip()]}
