"""Import tasks from the file formats of other circuit libraries."""

import csv
import os
import re
from pathlib import Path

from ..errors import TranscoderError
from ..text.checked import checked
from ..text.printable import printable
from ..text.strict_json import parse_json, read_json
from .greater_than import year_tokens
from .prompt_encoding import PromptEncoder
from .task import Task
from .templates import Prompt, Row


def from_eap_csv(path: str | os.PathLike, tokenizer, label: str = "answer", add_bos: bool | None = None) -> Task:
    """
    Read a CSV file of EAP-IG, with the columns `clean`, `corrupted`, and either `correct_idx` and `incorrect_idx` or
    `label`.

    Args:
        path (`str` or `os.PathLike`): The file.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): The tokenizer of the language model.
        label (`str`, *optional*, defaults to `"answer"`):
            Content of the column `label`: `"answer"`, the exact continuation of the clean prompt, or `"year"`, the last two
            digits of the first year in greater-than.
        add_bos (`bool`, *optional*): Whether prompts begin with the beginning-of-sequence token, as in [`PromptEncoder`].

    Returns:
        [`Task`], without wrong answers if `label` is the answer.

    Raises:
        [`TranscoderError`]: the file cannot be read, lacks a column, or was made for another tokenizer.
    """
    if label not in ("answer", "year"):
        raise TranscoderError(f"A label cannot be '{label}': choose answer or year.")
    path = Path(path)
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            columns = reader.fieldnames or []
            table = list(reader)
    except (OSError, ValueError, csv.Error) as error:
        raise _unreadable(path, error) from error
    if len(set(columns)) < len(columns):
        raise TranscoderError(f"{path} has two columns of the same name: rename one.")
    by_ids = "correct_idx" in columns
    if by_ids and label == "year":
        raise TranscoderError(f"{path} has the answers in correct_idx, not in label: leave out label='year'.")
    _require(path, columns, ["clean", "corrupted", *(("correct_idx", "incorrect_idx") if by_ids else ("label",))])
    encoder = PromptEncoder(tokenizer, add_bos)
    years = year_tokens(encoder) if label == "year" else None
    if years is not None and years.variant != "two_token":
        raise TranscoderError(
            f"{path} compares the last two digits of years, which the tokenizer does not write as one token: use "
            "greater_than, which compares the last digit instead."
        )
    rows = []
    for number, entry in enumerate(table):
        if None in entry or any(entry[column] is None for column in columns):
            raise TranscoderError(
                f"Line {number + 2} of {path} has {'more' if None in entry else 'fewer'} values than columns: fix the file."
            )
        if by_ids:
            right, wrong = (_token_ids(path, number, entry[name]) for name in ("correct_idx", "incorrect_idx"))
        elif years is not None:
            if not re.fullmatch(r"[0-9]{1,2}", entry["label"]):
                raise TranscoderError(f"The label {entry['label']!r} of line {number + 2} of {path} is not a year.")
            right, wrong = years.answers(entry["label"].zfill(2))
        else:
            right, wrong = [entry["label"]], []
        rows.append(Row(Prompt(entry["clean"]), Prompt(entry["corrupted"]), right, wrong))
    if by_ids:
        _check_ids(path, encoder, rows)
    return _task(path, encoder, rows, "EAP CSV")


def from_auto_circuit_json(path: str | os.PathLike, tokenizer, add_bos: bool | None = None) -> Task:
    """
    Read a JSON file of auto-circuit, with `prompts`, a list of `clean`, `corrupt`, `answers` and `wrong_answers`, and
    optionally `word_idxs`, the token positions in all rows, not counting a beginning-of-sequence token.

    Args:
        path (`str` or `os.PathLike`): The file.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): The tokenizer of the language model.
        add_bos (`bool`, *optional*): As the tasks have it; positions move with it.

    Returns:
        [`Task`], with the positions of the file, `end` as `END`.

    Raises:
        [`TranscoderError`]: the file cannot be read, lacks an entry, or was made for another tokenizer.
    """
    path = Path(path)
    content = _read_json(path)
    if not isinstance(content, dict) or not isinstance(content.get("prompts"), list):
        raise TranscoderError(f"{path} has no list 'prompts': give a file of auto-circuit.")
    encoder = PromptEncoder(tokenizer, add_bos)
    positions = {}
    for name, position in checked(content.get("word_idxs", {}), dict, f"'word_idxs' in {path}").items():
        if type(position) is not int:
            raise TranscoderError(f"The position {name} in {path} is {position!r}, but it should be a whole number.")
        positions["END" if name == "end" else name] = position + len(encoder.prefix)
    rows = []
    for number, entry in enumerate(content["prompts"]):
        checked(entry, dict, f"Prompt {number} in {path}")
        _require(path, entry, ["clean", "corrupt", "answers", "wrong_answers"], f"prompt {number}")
        if not isinstance(entry["clean"], str) or not isinstance(entry["corrupt"], str):
            raise TranscoderError(f"Prompt {number} of {path} is not text: files of token ids cannot be imported.")
        for name in ("answers", "wrong_answers"):
            for answer in checked(entry[name], list, f"'{name}' of prompt {number} in {path}"):
                if not isinstance(answer, str) and type(answer) is not int:
                    raise TranscoderError(
                        f"Prompt {number} of {path} has an answer that is neither text nor a token id: fix the file."
                    )
        prompts = [Prompt(entry[name]) for name in ("clean", "corrupt")]
        rows.append(Row(*prompts, entry["answers"], entry["wrong_answers"], positions=positions))  # pyright: ignore[reportCallIssue]
    if "END" in positions:
        for number, ids in enumerate(encoder.encode([row.clean.text for row in rows])):
            if len(ids) != positions["END"] + 1:
                raise TranscoderError(
                    f"By {path} prompts have {positions['END'] + 1} tokens, but prompt {number} has {len(ids)}: the file was "
                    "made for another tokenizer; remove word_idxs to use its prompts alone."
                )
    return _task(path, encoder, rows, "auto-circuit JSON")


def from_pairs_json(
    path: str | os.PathLike,
    tokenizer,
    corrupted: str | os.PathLike | None = None,
    candidates: list[str] | None = None,
    add_bos: bool | None = None,
) -> Task:
    """
    Read a JSON list of `[prompt, label]`, and optionally a second file with the corrupted prompts.

    Args:
        path (`str` or `os.PathLike`): The file. A label is the exact continuation of its prompt, including the space.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): The tokenizer of the language model.
        corrupted (`str` or `os.PathLike`, *optional*):
            A file of the same form and length, whose labels are the wrong answers.
        candidates (`list[str]`, *optional*): Candidates for the accuracy among candidates in every row.
        add_bos (`bool`, *optional*): Whether prompts begin with the beginning-of-sequence token, as in [`PromptEncoder`].

    Returns:
        [`Task`], with only clean prompts if there is no second file.

    Raises:
        [`TranscoderError`]: a file cannot be read or has another form, or a label is not a single token.
    """
    path = Path(path)
    clean = _read_pairs(path)
    others = [None] * len(clean) if corrupted is None else _read_pairs(Path(corrupted))
    if len(clean) != len(others):
        raise TranscoderError(f"{path} has {len(clean)} prompts and {corrupted} {len(others)}: give files that match.")
    rows = [
        Row(
            Prompt(prompt),
            None if other is None else Prompt(other[0]),
            [answer],
            [] if other is None or other[1] == answer else [other[1]],
            candidates,
        )
        for (prompt, answer), other in zip(clean, others, strict=True)
    ]
    return _task(path, PromptEncoder(tokenizer, add_bos), rows, "pairs JSON")


def from_mib(
    dataset, tokenizer, counterfactual: str = "s2_io_flip_counterfactual", add_bos: bool | None = None
) -> Task:
    """
    Convert a dataset of the Mechanistic Interpretability Benchmark, such as `mib-bench/ioi`, with the columns `prompt`,
    `choices` (a list, or `label` and `text`), `answerKey`, and counterfactuals with the same fields.

    Args:
        dataset ([`~datasets.Dataset`]): One split of the dataset.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): The tokenizer of the language model.
        counterfactual (`str`, *optional*, defaults to `"s2_io_flip_counterfactual"`):
            Name of the column with the corrupted prompts.
        add_bos (`bool`, *optional*): Whether prompts begin with the beginning-of-sequence token, as in [`PromptEncoder`].

    Returns:
        [`Task`]: the choice of `answerKey` is the right answer, and the others are wrong answers.

    Raises:
        [`TranscoderError`]: a column is missing, a choice is not a single token, or a pair differs in length.
    """
    others = [name for name in dataset.column_names if name.endswith("_counterfactual")]
    if counterfactual not in dataset.column_names:
        raise TranscoderError(
            f"The dataset has no column '{counterfactual}': choose from {', '.join(others) or 'another dataset'}."
        )
    _require("the dataset", dataset.column_names, ["prompt", "choices", "answerKey"])
    rows = []
    for number, entry in enumerate(dataset):
        choices, key = entry["choices"], entry["answerKey"]
        # Multiple-choice questions are answered with the letter of a choice.
        choices = choices.get("label") if isinstance(choices, dict) else choices
        other = entry[counterfactual]
        texts = [entry["prompt"], other.get("prompt") if isinstance(other, dict) else None]
        if not isinstance(choices, list) or not all(isinstance(text, str) for text in (*texts, *choices)):
            raise TranscoderError(
                f"Row {number} has no text as prompt, as counterfactual prompt or as a choice: fix the dataset."
            )
        if type(key) is not int or not 0 <= key < len(choices):
            raise TranscoderError(f"Row {number} has answerKey {key!r}, but {len(choices)} choices: fix the dataset.")
        # Prompts end in a word or a colon, and the choices have no leading space.
        answers = [choice if choice.startswith(" ") else f" {choice}" for choice in choices]
        rows.append(
            Row(
                Prompt(entry["prompt"].rstrip(" ")),
                Prompt(entry[counterfactual]["prompt"].rstrip(" ")),
                [answers[key]],
                answers[:key] + answers[key + 1 :],
            )
        )
    encoder = PromptEncoder(tokenizer, add_bos)
    return _task(dataset.info.dataset_name or "mib", encoder, rows, "MIB", counterfactual)


def _task(source, encoder, rows, form, corruption=None):
    # The folder of the file is not part of the name.
    name = Path(source).stem
    return Task.from_rows(encoder, rows, name, f"Imported from {form}.", settings={"corruption": corruption})


def _read_json(path):
    try:
        return read_json(path, object)
    except TranscoderError as error:
        raise _unreadable(path, error) from error


def _read_pairs(path):
    pairs = _read_json(path)
    if not isinstance(pairs, list) or not pairs:
        raise TranscoderError(f"{path} is not a list of [prompt, label]: give such a file.")
    for number, pair in enumerate(pairs):
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(part, str) for part in pair):
            raise TranscoderError(f"Entry {number} of {path} is not [prompt, label], both text: fix the file.")
    return pairs


def _require(source, found, needed, entry="it"):
    missing = [name for name in needed if name not in found]
    if missing:
        where = f"{source} lacks" if entry == "it" else f"In {source}, {entry} lacks"
        raise TranscoderError(
            f"{where[0].upper()}{where[1:]} {', '.join(missing)}: it has {printable(', '.join(map(str, found)))[:300] or 'nothing'}."
        )


def _token_ids(path, number, value):
    """Parse a token id, or a JSON list of them."""
    try:
        ids = parse_json(value, str(path), object)
    except TranscoderError:
        ids = None
    ids = ids if isinstance(ids, list) else [ids]
    if not ids or not all(type(id_) is int for id_ in ids):
        raise TranscoderError(f"{value!r} in line {number + 2} of {path} is not a token id: give whole numbers.")
    return ids


def _check_ids(path, encoder, rows):
    """Check that the ids are tokens that can follow the prompts; those of another tokenizer rarely can."""
    keys = [
        (number, row.clean.text, id_) for number, row in enumerate(rows) for id_ in (*row.answers, *row.wrong_answers)
    ]
    vocabulary = len(encoder.tokenizer)
    texts = [encoder.tokenizer.decode([id_]) if 0 <= id_ < vocabulary else "" for _, _, id_ in keys]
    found = encoder.next_tokens([(prompt, text) for (_, prompt, _), text in zip(keys, texts, strict=True)])
    for (number, _, id_), text, back in zip(keys, texts, found, strict=True):
        if back != id_:
            raise TranscoderError(
                f"Token {id_} ({text!r}) in line {number + 2} of {path} cannot follow the prompt: the file was made for another "
                "tokenizer."
            )


def _unreadable(path, error):
    reason = error.strerror if isinstance(error, OSError) else str(error).rstrip(".")
    return TranscoderError(f"{path} cannot be read ({reason}): give a complete file.")
