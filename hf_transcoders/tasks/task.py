"""Tasks: pairs of prompts with answers and named positions, as a dataset and as tensors."""

import operator
import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ..errors import TranscoderError
from ..files import atomic_directory, read_settled
from ..lm.inputs import check_tokens, length_groups
from ..lm.wrappers import takes_model
from ..text.printable import printable
from ..text.strict_json import to_json
from .prompt_encoding import PromptEncoder
from .templates import Prompt, Row


if TYPE_CHECKING:
    from datasets import Dataset


_DATASET_NAME, _TASK_NAME = "rows.parquet", "task.json"
_REQUIRED = ("clean", "clean_ids", "answer_ids", "wrong_ids", "candidate_ids", "positions", "template")


@dataclass(frozen=True)
class TokenBatch:
    """
    Prompts as inputs of a language model.

    Args:
        input_ids (`torch.LongTensor` of shape `(rows, longest)`): Token ids, padded on the right with 0.
        attention_mask (`torch.LongTensor` of shape `(rows, longest)`): 1 at tokens, 0 at padding.
        lengths (`torch.LongTensor` of shape `(rows,)`): Number of tokens in each row.
        positions (`dict[str, torch.LongTensor]`): Name -> index of the token in each row, of shape `(rows,)`.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    lengths: torch.Tensor
    positions: dict[str, torch.Tensor]

    @takes_model
    def forward_batches(self, model, rows: Sequence[int] | None = None) -> Iterator[tuple[list[int], "TokenBatch"]]:
        """Split the batch into prompts that can share a forward pass of a model; see [`length_groups`].

        Args:
            model ([`~transformers.PreTrainedModel`]): The language model.
            rows (`Sequence[int]`, *optional*): Indices of the rows in the task, for error messages.

        Yields:
            `tuple[list[int], TokenBatch]`: the indices of some prompts in this batch, and these prompts.

        Raises:
            [`TranscoderError`]: the model cannot read a prompt.
        """
        lengths = self.lengths.tolist()
        prompts = [ids[:length] for ids, length in zip(self.input_ids, lengths, strict=True)]
        check_tokens(model, prompts, "Prompt", range(len(prompts)) if rows is None else rows)
        for places in length_groups(model, lengths):
            yield places, self if len(places) == len(lengths) else self.select(places)

    def select(self, places: Sequence[int]) -> "TokenBatch":
        """Select some of the prompts, padded to the longest of them."""
        places = torch.as_tensor(places, device=self.lengths.device)
        longest = int(self.lengths[places].max())
        return TokenBatch(
            self.input_ids[places, :longest],
            self.attention_mask[places, :longest],
            self.lengths[places],
            {name: position[places] for name, position in self.positions.items()},
        )


@dataclass(frozen=True)
class AnswerBatch:
    """
    Token ids of answers, each of shape `(rows, most)`, padded on the right with -1.

    Args:
        right (`torch.LongTensor`): Right answers.
        wrong (`torch.LongTensor`): Wrong answers. A row may have none.
        candidates (`torch.LongTensor`): Candidates for the accuracy among candidates.
    """

    right: torch.Tensor
    wrong: torch.Tensor
    candidates: torch.Tensor

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> "AnswerBatch":
        """Apply a function to each of the three tensors."""
        return AnswerBatch(function(self.right), function(self.wrong), function(self.candidates))


class Task:
    """
    A [`~datasets.Dataset`] of prompts with answers, and its description.

    The columns are `clean` and `corrupted` (text); `clean_ids` and `corrupted_ids` (token ids, equally many within a row);
    `answer_ids`, `wrong_ids` and `candidate_ids` (token ids); `positions` (name -> token index, the same in both prompts;
    `END` predicts the answer); `template` (number of the template); and optionally `metadata`. The names of positions are
    roles in the clean prompt. A task without corrupted prompts has no `corrupted` and no `corrupted_ids`.

    Args:
        dataset ([`~datasets.Dataset`]): The rows.
        name (`str`): Short name, such as `"ioi"`.
        description (`str`, *optional*): One sentence about the question and the right answer.
        metric (`str`, *optional*, defaults to `"logit_difference"`):
            The default metric, such as `"logit_difference"` or `"probability_difference"`.
        settings (`dict`, *optional*): Settings of the task, such as seed, split and corruption, as JSON.
    """

    def __init__(
        self,
        dataset: "Dataset",
        name: str,
        description: str = "",
        metric: str = "logit_difference",
        settings: dict | None = None,
    ):
        missing = [column for column in _REQUIRED if column not in dataset.column_names]
        if missing:
            raise TranscoderError(
                f"The dataset of task '{name}' lacks the column(s) {', '.join(missing)}: make it with Task.from_pairs."
            )
        self.dataset = dataset
        self.name = name
        self.description = description
        self.metric = metric
        self.settings = dict(settings or {})

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, row: int) -> dict:
        return self.dataset[row]

    def __repr__(self) -> str:
        settings = ", ".join(f"{key}={value}" for key, value in self.settings.items())
        return f"Task({self.name}, {len(self)} rows, positions {', '.join(self.position_names)}; {settings})"

    @property
    def position_names(self) -> list[str]:
        """Names of the positions, in their order in the first row."""
        first = self.dataset[0]["positions"]
        return sorted(first, key=first.get)

    @property
    def has_corrupted(self) -> bool:
        """Whether the task has corrupted prompts."""
        return "corrupted_ids" in self.dataset.column_names

    def select(self, rows: Sequence[int]) -> "Task":
        """Select some rows of the task."""
        return Task(self.dataset.select(rows), self.name, self.description, self.metric, self.settings)

    def rows_by_length(self) -> dict[int, list[int]]:
        """Group the rows by length: number of tokens -> indices of the rows, shortest first."""
        groups = defaultdict(list)
        for row, ids in enumerate(self.dataset["clean_ids"]):
            groups[len(ids)].append(row)
        return dict(sorted(groups.items()))

    def tokens(
        self, which: str = "clean", rows: Sequence[int] | None = None, device: str | torch.device | None = None
    ) -> TokenBatch:
        """
        Make tensors of the prompts.

        Args:
            which (`str`, *optional*, defaults to `"clean"`): The side of each pair, `"clean"` or `"corrupted"`.
            rows (`Sequence[int]`, *optional*): Indices of the rows. By default all rows.
            device (`str` or `torch.device`, *optional*): Device of the tensors.

        Returns:
            [`TokenBatch`]

        Raises:
            [`TranscoderError`]: the task has no such prompts or rows.
        """
        if which not in ("clean", "corrupted"):
            raise TranscoderError(f"There are no '{which}' prompts: choose clean or corrupted.")
        if which == "corrupted" and not self.has_corrupted:
            raise TranscoderError(f"The task '{self.name}' has no corrupted prompts: give them when making the task.")
        batch = self._rows(rows, [f"{which}_ids", "positions"])
        ids = batch[f"{which}_ids"]
        lengths = torch.tensor([len(row) for row in ids], device=device)
        input_ids = _pad(ids, 0, device)
        attention_mask = (torch.arange(input_ids.shape[1], device=device) < lengths[:, None]).long()
        positions = {
            name: torch.tensor([row[name] for row in batch["positions"]], device=device)
            for name in batch["positions"][0]
        }
        return TokenBatch(input_ids, attention_mask, lengths, positions)

    def answers(self, rows: Sequence[int] | None = None, device: str | torch.device | None = None) -> AnswerBatch:
        """
        Make tensors of the right answers, wrong answers and candidates.

        Args:
            rows (`Sequence[int]`, *optional*): Indices of the rows. By default all rows.
            device (`str` or `torch.device`, *optional*): Device of the tensors.

        Returns:
            [`AnswerBatch`]
        """
        batch = self._rows(rows, ["answer_ids", "wrong_ids", "candidate_ids"])
        return AnswerBatch(*(_pad(batch[name], -1, device) for name in ("answer_ids", "wrong_ids", "candidate_ids")))

    def _rows(self, rows, columns):
        dataset = self.dataset.select_columns(columns)
        if rows is None:
            return dataset[:]
        rows = [int(row) for row in rows]
        outside = [row for row in rows if not -len(self) <= row < len(self)]
        if outside or not rows:
            asked = f"row {outside[0]} was asked for" if outside else "no rows were asked for"
            raise TranscoderError(f"The task has rows 0 to {len(self) - 1}, but {asked}: choose among them.")
        return dataset[rows]

    @classmethod
    def from_pairs(
        cls,
        tokenizer,
        clean: Sequence[str],
        corrupted: Sequence[str] | None,
        answers: Sequence[str | int | Sequence[str] | Sequence[int]],
        wrong_answers: Sequence[str | int | Sequence[str] | Sequence[int]] | None = None,
        *,
        candidates: Sequence[Sequence[str] | Sequence[int]] | None = None,
        positions: dict[str, Sequence[str | tuple[int, int]]] | None = None,
        templates: Sequence[int] | None = None,
        metadata: Sequence[dict] | None = None,
        name: str = "custom",
        description: str = "",
        metric: str = "logit_difference",
        add_bos: bool | None = None,
    ) -> "Task":
        """
        Make a task from your own prompts.

        Args:
            tokenizer ([`~transformers.PreTrainedTokenizerBase`]): The tokenizer of the language model.
            clean (`Sequence[str]`): Clean prompts, without answers.
            corrupted (`Sequence[str]`, *optional*): Corrupted prompts, with as many tokens as the clean prompts, or `None`.
            answers (`Sequence`):
                One or several right answers for each row: token ids, or continuations of the clean prompt as text, with the
                space before them (`" Mary"`). Each is a single token.
            wrong_answers (`Sequence`, *optional*): Wrong answers, in the same form.
            candidates (`Sequence`, *optional*):
                Candidates for the accuracy among candidates. By default the right and the wrong answers.
            positions (`dict`, *optional*):
                Name -> for each row a word that occurs exactly once in the clean prompt, or its begin and end in
                characters. `END`, the last token, is always added.
            templates (`Sequence[int]`, *optional*): Number of the template for each row.
            metadata (`Sequence[dict]`, *optional*): Further facts about each row, with the same names in all rows.
            name, description, metric: The arguments of [`Task`].
            add_bos (`bool`, *optional*): Whether prompts begin with the beginning-of-sequence token, as in [`PromptEncoder`].

        Returns:
            [`Task`]

        Raises:
            [`TranscoderError`]: the lists differ in length, the prompts of a pair differ in length, an answer is not a single
                token, or a word is not found.
        """
        columns = {
            "corrupted": corrupted,
            "answers": answers,
            "wrong_answers": wrong_answers,
            "candidates": candidates,
            "templates": templates,
            "metadata": metadata,
            **{f"positions['{key}']": words for key, words in (positions or {}).items()},
        }
        for column, values in columns.items():
            if values is not None and len(values) != len(clean):
                raise TranscoderError(
                    f"There are {len(clean)} clean prompts, but {column} has {len(values)} entries: give one for each."
                )
        rows = []
        for index, text in enumerate(clean):
            spans = {key: _span(text, words[index], index) for key, words in (positions or {}).items()}
            rows.append(
                Row(
                    clean=Prompt(text, spans),
                    corrupted=None if corrupted is None else Prompt(corrupted[index]),
                    answers=_as_list(answers[index]),
                    wrong_answers=[] if wrong_answers is None else _as_list(wrong_answers[index]),
                    candidates=None if candidates is None else _as_list(candidates[index]),
                    template=0 if templates is None else int(templates[index]),
                    metadata={} if metadata is None else metadata[index],
                )
            )
        return cls.from_rows(PromptEncoder(tokenizer, add_bos), rows, name, description, metric)

    @classmethod
    def from_rows(
        cls,
        encoder: PromptEncoder,
        rows: Sequence[Row],
        name: str,
        description: str = "",
        metric: str = "logit_difference",
        settings: dict | None = None,
    ) -> "Task":
        """Make a task from rows, which are encoded and checked here."""
        from datasets import Dataset, Features, List, Value

        if not rows:
            raise TranscoderError(f"The task '{name}' has no rows: give at least one pair of prompts.")
        without = sum(row.corrupted is None for row in rows)
        if 0 < without < len(rows):
            raise TranscoderError(
                f"{without} of {len(rows)} rows have no corrupted prompt: give one for all rows or for none."
            )
        clean_ids, positions = _encode(encoder, rows, [row.clean for row in rows])
        columns = {"clean": [row.clean.text for row in rows], "clean_ids": clean_ids}
        token_ids = List(Value("int32"))
        features = {"clean": Value("string"), "clean_ids": token_ids}
        if not without:
            corrupted_ids, corrupted_positions = _encode(encoder, rows, [row.corrupted for row in rows])
            for index, row in enumerate(rows):
                _check_pair(index, row, clean_ids[index], corrupted_ids[index])
                for key, position in corrupted_positions[index].items():
                    if positions[index].get(key, position) != position:
                        raise TranscoderError(
                            f"In row {index} the position {key} is token {positions[index][key]} of the clean prompt but "
                            f"token {position} of the corrupted one: choose words of equally many tokens."
                        )
            columns |= {"corrupted": [row.corrupted.text for row in rows], "corrupted_ids": corrupted_ids}
            features |= {"corrupted": Value("string"), "corrupted_ids": token_ids}
        answers = _answer_ids(encoder, rows)
        columns |= {
            "answer_ids": answers["answers"],
            "wrong_ids": answers["wrong_answers"],
            "candidate_ids": answers["candidates"],
            "positions": positions,
            "template": [row.template for row in rows],
        }
        features |= dict.fromkeys(("answer_ids", "wrong_ids", "candidate_ids"), token_ids)
        features |= {"positions": {key: Value("int32") for key in positions[0]}, "template": Value("int32")}
        dataset = Dataset.from_dict(columns, features=Features(features))
        if rows[0].metadata:
            dataset = dataset.add_column("metadata", [row.metadata for row in rows])
        settings = (settings or {}) | {"size": len(rows), "add_bos": bool(encoder.prefix)}
        return cls(dataset, name, description, metric, settings)

    def save(self, folder: str | os.PathLike) -> None:
        """Write the rows as Parquet and the description as JSON into a folder."""
        description = {
            "name": self.name,
            "description": self.description,
            "metric": self.metric,
            "settings": self.settings,
        }
        with atomic_directory(folder) as partial:
            self.dataset.to_parquet(str(partial / _DATASET_NAME))
            (partial / _TASK_NAME).write_text(to_json(description) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: str | os.PathLike) -> "Task":
        """
        Read a folder of [`Task.save`].

        Raises:
            [`TranscoderError`]: the folder has no task, or its files cannot be read.
        """
        from .task_file import read_task

        folder = Path(folder)

        def read(opening):
            for file in (_TASK_NAME, _DATASET_NAME):
                if not (folder / file).is_file():
                    raise TranscoderError(f"{printable(folder)} has no {file}: give a folder of Task.save.")
            return read_task(opening(folder / _TASK_NAME), opening(folder / _DATASET_NAME))

        return cls(**read_settled(folder, read))


def _encode(encoder, rows, prompts):
    """Token ids and positions of prompts, including given positions and `END`."""
    texts = [prompt.text for prompt in prompts]
    ids = encoder.encode(texts)
    positions = []
    for index, (row, located) in enumerate(
        zip(rows, encoder.locate(texts, [prompt.spans for prompt in prompts]), strict=True)
    ):
        if len(ids[index]) == len(encoder.prefix):
            raise TranscoderError(f"The prompt of row {index} is empty: give a text.")
        last = len(ids[index]) - 1
        positions.append({**located, **row.positions, "END": row.positions.get("END", last)})
        for key, position in positions[-1].items():
            if not 0 <= position <= last:
                raise TranscoderError(
                    f"The position {key} of row {index} is {str(position)[:20]}, but its prompt has {last + 1} tokens: was it made "
                    "for another tokenizer?"
                )
    return ids, positions


def _check_pair(index, row, clean, corrupted):
    if len(clean) != len(corrupted):
        raise TranscoderError(
            f"In row {index} the clean prompt has {len(clean)} tokens and the corrupted one {len(corrupted)}: "
            f"give pairs of equal length ({row.clean.text[-60:]!r} and {row.corrupted.text[-60:]!r})."
        )


def _answer_ids(encoder, rows):
    """Token ids of right answers, wrong answers and candidates of all rows; each must be a single token after its prompt."""
    given = {
        "answers": [row.answers for row in rows],
        "wrong_answers": [row.wrong_answers for row in rows],
        "candidates": [row.candidates for row in rows],
    }
    texts = sorted(
        {
            (row.clean.text, answer)
            for entries in given.values()
            for row, entry in zip(rows, entries, strict=True)
            for answer in entry or []
            if isinstance(answer, str)
        }
    )
    known = dict(zip(texts, encoder.next_tokens(texts), strict=True))
    vocabulary = len(encoder.tokenizer)
    found = {}
    for what, entries in given.items():
        found[what] = []
        for index, (row, entry) in enumerate(zip(rows, entries, strict=True)):
            ids = []
            for answer in entry or []:
                id_ = known[row.clean.text, answer] if isinstance(answer, str) else _token_id(answer, index)
                if id_ is None:
                    raise TranscoderError(
                        f"The answer {answer!r} of row {index} is not a single token after its prompt "
                        f"({row.clean.text[-40:]!r}): choose another answer, or add the space before it."
                    )
                if not 0 <= id_ < vocabulary:
                    raise TranscoderError(
                        f"The answer of row {index} is token {str(id_)[:20]}, but the tokenizer has {vocabulary}: the file was made "
                        "for another tokenizer."
                    )
                ids.append(id_)
            found[what].append(list(dict.fromkeys(ids)))
    for index, (right, wrong) in enumerate(zip(found["answers"], found["wrong_answers"], strict=True)):
        if not right:
            raise TranscoderError(f"Row {index} has no right answer: give at least one.")
        if set(right) & set(wrong):
            raise TranscoderError(f"In row {index} the same token is a right and a wrong answer: give different ones.")
        found["candidates"][index] = found["candidates"][index] or right + wrong
        if not set(right) <= set(found["candidates"][index]):
            raise TranscoderError(f"In row {index} a right answer is not among the candidates: add it to them.")
    return found


def _token_id(answer, index):
    """A whole number from any library; 0.5 and `True` are not accepted."""
    try:
        if isinstance(answer, bool):
            raise TypeError("a bool is not a token id")
        return operator.index(answer)
    except TypeError as error:
        raise TranscoderError(
            f"The answer {answer!r} of row {index} is neither text nor a token id: give one of them."
        ) from error


def _span(text, word, index):
    if not isinstance(word, str):
        begin, end = word
        if not 0 <= begin < end <= len(text):
            raise TranscoderError(f"Row {index} has no characters {begin} to {end}: its prompt has {len(text)}.")
        return begin, end
    if text.count(word) != 1:
        raise TranscoderError(
            f"{word!r} occurs {text.count(word)} times in the prompt of row {index}: give its begin and end in characters."
        )
    begin = text.index(word)
    return begin, begin + len(word)


def _as_list(answers):
    return [answers] if isinstance(answers, str | int) else list(answers)


def _pad(rows, filler, device):
    longest = max(map(len, rows))
    return torch.tensor([row + [filler] * (longest - len(row)) for row in rows], dtype=torch.long, device=device)
