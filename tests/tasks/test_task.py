"""Tensors and files of a task, tasks from given prompts, and refusals."""

import pytest
import torch

from hf_transcoders import TranscoderError
from hf_transcoders.tasks import Task, greater_than, indirect_object_identification


CLEAN = [
    "Then, John and Mary went to the store. John gave a ring to",
    "After Tom and Anna went to the house, Tom gave a bone to",
]
CORRUPTED = [CLEAN[0].replace(". John", ". Mary"), CLEAN[1].replace(", Tom", ", Anna")]


def make(tokenizer, **changes):
    arguments = {
        "clean": CLEAN,
        "corrupted": CORRUPTED,
        "answers": [" Mary", " Anna"],
        "wrong_answers": [" John", [" Tom", " John"]],
        "positions": {"IO": ["Mary", "Anna"], "S2": [(39, 43), (38, 41)]},
    }
    return Task.from_pairs(tokenizer, **{**arguments, **changes})


def test_tokens_are_padded_on_the_right(tokenizer):
    task = indirect_object_identification(tokenizer, size=30, corruption="s2_io_flip")
    rows = [4, 0, 13, 4]
    for which in ("clean", "corrupted"):
        batch = task.tokens(which, rows)
        assert batch.input_ids.shape == batch.attention_mask.shape == (4, batch.lengths.max())
        for index, row in enumerate(rows):
            ids = task[row][f"{which}_ids"]
            assert batch.input_ids[index, : len(ids)].tolist() == ids and batch.lengths[index] == len(ids)
            assert not batch.input_ids[index, len(ids) :].any()
            assert batch.attention_mask[index].tolist() == [1] * len(ids) + [0] * (batch.lengths.max() - len(ids))
            assert {name: int(batch.positions[name][index]) for name in batch.positions} == task[row]["positions"]
    assert len(task.tokens().input_ids) == 30


def test_rows_by_length(bpe):
    task = indirect_object_identification(bpe, size=30)
    groups = task.rows_by_length()
    assert list(groups) == sorted(groups) and sorted(sum(groups.values(), [])) == list(range(30))
    for length, rows in groups.items():
        assert set(task.tokens(rows=rows).lengths.tolist()) == {length}
        assert task.tokens(rows=rows).attention_mask.all()


def test_answers_are_padded_with_minus_one(bpe):
    task = make(bpe)
    mary, anna, john, tom = (bpe(f" {name}")["input_ids"][0] for name in ("Mary", "Anna", "John", "Tom"))
    answers = task.answers()
    assert answers.right.tolist() == [[mary], [anna]]
    assert answers.wrong.tolist() == [[john, -1], [tom, john]]
    assert answers.candidates.tolist() == [[mary, john, -1], [anna, tom, john]]
    assert task.answers([1]).wrong.tolist() == [[tom, john]]


def test_from_pairs_finds_words(tokenizer):
    task = make(tokenizer, templates=[3, 5], metadata=[{"a": 1}, {"a": 2}])
    for row, io, s in zip(task.dataset, ("Mary", "Anna"), ("John", "Tom"), strict=True):
        for name, word in (("IO", io), ("S2", s), ("END", "to")):
            assert tokenizer.decode([row["clean_ids"][row["positions"][name]]]).strip() == word
    assert task.dataset["template"][:] == [3, 5] and task.dataset["metadata"][1] == {"a": 2}
    # The position of a word of several tokens is its last token.
    text = "The kiss wq went"
    row = Task.from_pairs(tokenizer, [text], None, [" to"], positions={"odd": ["wq"]})[0]
    head = tokenizer("The kiss wq")["input_ids"]
    assert row["positions"]["odd"] == len(head) - 1


def test_a_task_may_lack_corrupted_prompts(bpe):
    task = make(bpe, corrupted=None)
    assert not task.has_corrupted and "corrupted" not in task.dataset.column_names
    with pytest.raises(TranscoderError, match="'custom' has no corrupted prompts"):
        task.tokens("corrupted")


def test_save_and_load(bpe, tmp_path):
    for task in (indirect_object_identification(bpe, size=20), greater_than(bpe, size=10), make(bpe, corrupted=None)):
        folder = tmp_path / task.name
        task.save(folder)
        assert {path.name for path in folder.iterdir()} == {"rows.parquet", "task.json"}
        loaded = Task.load(folder)
        assert loaded.dataset[:] == task.dataset[:] and loaded.dataset.features == task.dataset.features
        assert (loaded.name, loaded.description, loaded.metric) == (task.name, task.description, task.metric)
        assert loaded.settings == task.settings
        assert torch.equal(loaded.tokens().input_ids, task.tokens().input_ids)


def test_loading_what_is_no_task(bpe, tmp_path):
    with pytest.raises(TranscoderError, match="has no task.json"):
        Task.load(tmp_path)
    make(bpe).save(tmp_path / "task")
    whole = (tmp_path / "task" / "rows.parquet").read_bytes()
    (tmp_path / "task" / "rows.parquet").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(TranscoderError, match="cannot be read"):
        Task.load(tmp_path / "task")
    (tmp_path / "task" / "rows.parquet").write_bytes(whole)
    (tmp_path / "task" / "task.json").write_text("[]")
    with pytest.raises(TranscoderError, match="cannot be read"):
        Task.load(tmp_path / "task")
    with pytest.raises(TranscoderError, match="lacks the column"):
        Task(make(bpe).dataset.remove_columns("positions"), "custom")


def test_select_keeps_the_description(bpe):
    task = indirect_object_identification(bpe, size=20)
    some = task.select([5, 2])
    assert some.dataset["clean"][:] == [task[5]["clean"], task[2]["clean"]]
    assert some.name == task.name and some.settings == task.settings and "IO" in repr(some)


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            {"corrupted": [CLEAN[0], CLEAN[1] + " the"]},
            "In row 1 the clean prompt has .* tokens and the corrupted one",
        ),
        ({"answers": [" Mary", " Anna John"]}, "' Anna John' of row 1 is not a single token"),
        ({"answers": [" Mary", " the store"]}, "not a single token"),
        ({"answers": [" Mary"]}, "2 clean prompts, but answers has 1 entries"),
        ({"wrong_answers": [" Mary", " Tom"]}, "row 0 the same token is a right and a wrong answer"),
        ({"answers": [[], " Anna"]}, "Row 0 has no right answer"),
        ({"answers": [10**6, 5]}, "token 1000000, but the tokenizer has"),
        ({"answers": [-1, 5]}, "token -1, but the tokenizer has"),
        ({"candidates": [[" Tom"], [" Anna"]]}, "row 0 a right answer is not among the candidates"),
        ({"positions": {"IO": ["Mary", "John"]}}, "'John' occurs 0 times in the prompt of row 1"),
        ({"positions": {"S": ["John", "Anna"]}}, "'John' occurs 2 times in the prompt of row 0"),
        ({"positions": {"S": [(0, 999), (0, 3)]}}, "Row 0 has no characters 0 to 999"),
        ({"positions": {"S": [(5, 8), (0, 3)]}}, r"The position S \(' Jo'\) does not end at the end of a token"),
        ({"positions": {"S": ["Mary"]}}, r"positions\['S'\] has 1 entries"),
        ({"clean": ["", CLEAN[1]], "positions": None}, "The prompt of row 0 is empty"),
        ({"clean": [], "corrupted": [], "answers": [], "wrong_answers": [], "positions": None}, "has no rows"),
    ],
)
def test_wrong_pairs(tokenizers, changes, message):
    for name in ("byte_level_bpe", "unigram_with_bos"):
        with pytest.raises(TranscoderError, match=message) as error:
            make(tokenizers(name), **changes)
        assert "\n" not in str(error.value)


def test_wrong_rows(bpe):
    task = make(bpe)
    with pytest.raises(TranscoderError, match="rows 0 to 1, but row 2 was asked for"):
        task.tokens(rows=[0, 2])
    with pytest.raises(TranscoderError, match="no rows were asked for"):
        task.answers(rows=[])
    with pytest.raises(TranscoderError, match="no 'dirty' prompts"):
        task.tokens("dirty")
