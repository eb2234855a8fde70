"""Damaged task files: each can be measured or is refused in one sentence."""

import json

import pyarrow
import pyarrow.parquet
import pytest

from hf_transcoders import TranscoderError
from hf_transcoders.tasks import Task, from_auto_circuit_json, from_eap_csv, from_mib, from_pairs_json
from tests.mutations import mutate_json
from tests.tasks.test_imports import CLEAN, CORRUPTED, prompts, write_csv, write_json
from tests.tasks.test_task import make


def use(task):
    repr(task).encode()
    assert set(task.position_names) and len(task.rows_by_length()) >= 1
    tokens, answers = task.tokens(), task.answers()
    assert tokens.input_ids.min() >= 0 and (answers.right >= 0).any(-1).all()
    if task.has_corrupted:
        assert task.tokens("corrupted").input_ids.shape == tokens.input_ids.shape
    for position in tokens.positions.values():
        assert (position < tokens.lengths).all()
    task.select([0])


def test_mutated_tasks_are_refused_or_usable(bpe, tmp_path):
    task = make(bpe)
    task.save(tmp_path)
    description = json.loads((tmp_path / "task.json").read_text())
    table = pyarrow.parquet.read_table(tmp_path / "rows.parquet")
    rows = table.to_pylist()
    refused = 0
    for seed in range(100):
        (tmp_path / "task.json").write_text(
            json.dumps(mutate_json(description, seed) if seed % 4 == 0 else description)
        )
        if seed % 4:
            try:
                changed = pyarrow.Table.from_pylist(mutate_json(rows, seed))
            except (pyarrow.ArrowException, TypeError, AttributeError, OverflowError):
                continue
            pyarrow.parquet.write_table(changed, tmp_path / "rows.parquet")
        else:
            pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
        try:
            loaded = Task.load(tmp_path)
        except TranscoderError as error:
            refused += 1
            assert str(error).isprintable()
        else:
            use(loaded)
    assert refused > 20


def test_flipped_bytes_of_rows(bpe, tmp_path):
    make(bpe).save(tmp_path)
    whole = (tmp_path / "rows.parquet").read_bytes()
    for at in range(0, len(whole), max(1, len(whole) // 40)):
        (tmp_path / "rows.parquet").write_bytes(whole[:at] + bytes([whole[at] ^ 0xFF]) + whole[at + 1 :])
        try:
            loaded = Task.load(tmp_path)
        except TranscoderError as error:
            assert str(error).isprintable()
        else:
            use(loaded)


@pytest.mark.parametrize(
    "answers", [[0.5], [True], [1e-300], [None], [[]], [{}], 3.0, "ab", {}, None, [10**30], [-1], [" Mary", False]]
)
@pytest.mark.parametrize("which", ["answers", "wrong_answers"])
def test_answers_are_text_or_token_ids(bpe, tmp_path, answers, which):
    path = write_json(tmp_path / "file.json", prompts(**{which: answers}))
    with pytest.raises(TranscoderError) as error:
        from_auto_circuit_json(path, bpe)
    assert str(error.value).isprintable()


@pytest.mark.parametrize("answer", [0.5, True, None, 1e300])
def test_answers_of_pairs_are_text_or_token_ids(bpe, answer):
    with pytest.raises(TranscoderError, match="neither text nor a token id"):
        Task.from_pairs(bpe, CLEAN[:1], None, [[answer]])


def test_mutated_imports_are_refused_or_usable(bpe, tmp_path):
    auto = prompts() | {"word_idxs": {"IO": 2}}
    pairs = [[CLEAN[0], " Mary"], [CLEAN[1], " Anna"]]
    refused = 0
    for seed in range(80):
        read, content = ((from_auto_circuit_json, auto), (from_pairs_json, pairs))[seed % 2]
        path = write_json(tmp_path / "file.json", mutate_json(content, seed))
        try:
            task = read(path, bpe)
        except TranscoderError as error:
            refused += 1
            assert str(error).isprintable()
        else:
            use(task)
    assert refused > 40


@pytest.mark.parametrize(
    "text",
    [
        "", "\n", "clean\n", "clean,corrupted,label", "clean,corrupted,label\na,b,c,d\n", "clean,clean,corrupted,label\na,b,c,d\n",
        'clean,corrupted,label\n"a', '"clean,corrupted\nlabel\x1b', "clean,corrupted,correct_idx,incorrect_idx\na,b,true,1\n",
        "clean,corrupted,correct_idx,incorrect_idx\na,b,0.5,1\n", f"clean,corrupted,correct_idx,incorrect_idx\na,b,{'[' * 9999},1\n",
        f"clean,corrupted,correct_idx,incorrect_idx\na,b,{'1' * 5000},1\n", f"clean,corrupted,label\n{'a' * 200_000},b,c\n",
    ],
)  # fmt: skip
def test_odd_csv_files(bpe, tmp_path, text):
    (tmp_path / "x.csv").write_text(text)
    with pytest.raises(TranscoderError) as error:
        from_eap_csv(tmp_path / "x.csv", bpe)
    assert str(error.value).isprintable()


def test_a_csv_file_with_a_byte_order_mark(bpe, tmp_path):
    path = write_csv(tmp_path / "x.csv", ["clean", "corrupted", "label"], [[CLEAN[0], CORRUPTED[0], " Mary"]])
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    use(from_eap_csv(path, bpe))


@pytest.mark.parametrize(
    "change",
    [{"prompt": 3}, {"choices": "ab"}, {"answerKey": True}, {"answerKey": 0.5}, {"s2_io_flip_counterfactual": "x"}],
)
def test_odd_rows_of_mib(bpe, change):
    from datasets import Dataset

    row = {
        "prompt": CLEAN[0],
        "choices": ["Mary", "John"],
        "answerKey": 0,
        "s2_io_flip_counterfactual": {"prompt": CORRUPTED[0]},
    }
    with pytest.raises(TranscoderError) as error:
        from_mib(Dataset.from_list([row | change]), bpe)
    assert str(error.value).isprintable()
