"""Files of other libraries, valid and broken."""

import csv
import json

import pytest
from datasets import Dataset

from hf_transcoders import TranscoderError
from hf_transcoders.tasks import from_auto_circuit_json, from_eap_csv, from_mib, from_pairs_json


CLEAN = [
    "Then, John and Mary went to the store. John gave a ring to",
    "Then, Tom and Anna went to the house. Tom gave a bone to",
]
CORRUPTED = [CLEAN[0].replace(". John", ". Mary"), CLEAN[1].replace(". Tom", ". Anna")]


def write_csv(path, columns, rows):
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([columns, *rows])
    return path


def write_json(path, content):
    path.write_text(json.dumps(content))
    return path


def id_of(tokenizer, word):
    return tokenizer(f"the {word}")["input_ids"][-1]


def check(task, tokenizer, wrong=True, corrupted=True):
    assert task.dataset["clean"][:] == CLEAN
    assert task.dataset["answer_ids"][:] == [[id_of(tokenizer, "Mary")], [id_of(tokenizer, "Anna")]]
    assert task.has_corrupted == corrupted
    if corrupted:
        assert task.dataset["corrupted"][:] == CORRUPTED
    expected = [[id_of(tokenizer, "John")], [id_of(tokenizer, "Tom")]] if wrong else [[], []]
    assert task.dataset["wrong_ids"][:] == expected


def test_eap_csv_with_token_ids(tokenizer, tmp_path):
    ids = [[id_of(tokenizer, word) for word in words] for words in (("Mary", "John"), ("Anna", "Tom"))]
    path = tmp_path / "ioi.csv"
    rows = [[clean, corrupted, "ignored", *pair] for clean, corrupted, pair in zip(CLEAN, CORRUPTED, ids, strict=True)]
    write_csv(path, ["clean", "corrupted", "corrupted_hard", "correct_idx", "incorrect_idx"], rows)
    task = from_eap_csv(path, tokenizer)
    check(task, tokenizer)
    assert task.name == "ioi"
    rows[0][4] = json.dumps([ids[0][1], ids[1][1]])
    write_csv(path, ["clean", "corrupted", "corrupted_hard", "correct_idx", "incorrect_idx"], rows)
    assert from_eap_csv(path, tokenizer)[0]["wrong_ids"] == [ids[0][1], ids[1][1]]


def test_eap_csv_with_labels(tokenizer, tmp_path):
    rows = list(zip(CLEAN, CORRUPTED, [" Mary", " Anna"], strict=True))
    check(
        from_eap_csv(write_csv(tmp_path / "a.csv", ["clean", "corrupted", "label"], rows), tokenizer), tokenizer, False
    )


def test_eap_csv_with_years(bpe, tokenizers, tmp_path):
    text = "The war lasted from the year 17{} to the year 17"
    path = write_csv(
        tmp_path / "gt.csv", ["clean", "corrupted", "label"], [[text.format(96), text.format("01"), "96"]]
    )
    row = from_eap_csv(path, bpe, label="year")[0]
    assert bpe.convert_ids_to_tokens(row["answer_ids"]) == ["97", "98", "99"] and len(row["wrong_ids"]) == 97
    with pytest.raises(TranscoderError, match="does not write as one token: use greater_than"):
        from_eap_csv(path, tokenizers("unigram_with_bos"), label="year")


def test_auto_circuit_json(tokenizer, tmp_path):
    content = {
        "seq_labels": ["Then"],
        "prompts": [
            {"clean": clean, "corrupt": corrupt, "answers": [right], "wrong_answers": [wrong]}
            for clean, corrupt, right, wrong in zip(
                CLEAN, CORRUPTED, [" Mary", " Anna"], [" John", " Tom"], strict=True
            )
        ],
    }
    path = write_json(tmp_path / "ioi.json", content)
    check(from_auto_circuit_json(path, tokenizer), tokenizer)
    # Positions in the file do not count a beginning-of-sequence token.
    plain = tokenizer(CLEAN[0], add_special_tokens=False)["input_ids"]
    content["word_idxs"] = {"IO": plain.index(id_of(tokenizer, "Mary")), "end": len(plain) - 1}
    task = from_auto_circuit_json(write_json(path, content), tokenizer)
    assert [tokenizer.decode([row["clean_ids"][row["positions"]["IO"]]]).strip() for row in task.dataset] == [
        "Mary",
        "Anna",
    ]
    assert [row["positions"]["END"] for row in task.dataset] == [len(row["clean_ids"]) - 1 for row in task.dataset]
    content["word_idxs"]["end"] -= 2
    with pytest.raises(TranscoderError, match="made for another tokenizer; remove word_idxs"):
        from_auto_circuit_json(write_json(path, content), tokenizer)


def test_pairs_json(tokenizer, tmp_path):
    clean = write_json(tmp_path / "clean.json", list(zip(CLEAN, [" Mary", " Anna"], strict=True)))
    corrupted = write_json(tmp_path / "corrupted.json", list(zip(CORRUPTED, [" John", " Tom"], strict=True)))
    check(from_pairs_json(clean, tokenizer, corrupted), tokenizer)
    check(from_pairs_json(clean, tokenizer), tokenizer, wrong=False, corrupted=False)
    task = from_pairs_json(clean, tokenizer, candidates=[" Mary", " Anna", " Tom"])
    assert task[0]["candidate_ids"] == [id_of(tokenizer, word) for word in ("Mary", "Anna", "Tom")]


def test_mib(tokenizer):
    counterfactuals = [
        {"prompt": corrupted, "choices": names, "answerKey": 0}
        for corrupted, names in zip(CORRUPTED, (["John", "Mary"], ["Tom", "Anna"]), strict=True)
    ]
    columns = {"prompt": CLEAN, "choices": [["Mary", "John"], ["Tom", "Anna"]], "answerKey": [0, 1]}
    dataset = Dataset.from_dict(columns | {"s2_io_flip_counterfactual": counterfactuals})
    check(from_mib(dataset, tokenizer), tokenizer)
    labelled = [{"label": names, "text": ["x", "y"]} for names in columns["choices"]]
    dataset = Dataset.from_dict(columns | {"choices": labelled, "abc_counterfactual": counterfactuals})
    check(from_mib(dataset, tokenizer, "abc_counterfactual"), tokenizer)
    with pytest.raises(TranscoderError, match="no column 's2_io_flip_counterfactual': choose from abc_counterfactual"):
        from_mib(dataset, tokenizer)
    with pytest.raises(TranscoderError, match="The dataset lacks answerKey"):
        from_mib(dataset.remove_columns("answerKey"), tokenizer, "abc_counterfactual")
    with pytest.raises(TranscoderError, match="Row 0 has answerKey 7, but 2 choices"):
        from_mib(dataset.select([0]).map(lambda row: {"answerKey": 7}), tokenizer, "abc_counterfactual")


def prompts(**changes):
    prompt = {"clean": CLEAN[0], "corrupt": CORRUPTED[0], "answers": [" Mary"], "wrong_answers": [" John"]}
    return {"prompts": [{**prompt, **changes}]}


@pytest.mark.parametrize(
    "content, message",
    [
        ([1], "no list 'prompts'"),
        ({"prompts": [{"clean": "a"}]}, "prompt 0 lacks corrupt, answers, wrong_answers: it has clean"),
        (prompts(clean=[1, 2]), "Prompt 0 .* is not text"),
        (prompts(answers=[" Mary Anna"]), "' Mary Anna' of row 0 is not a single token"),
        (prompts(corrupt=CORRUPTED[0] + " the"), "give pairs of equal length"),
        (prompts() | {"word_idxs": {"IO": 99}}, "The position IO of row 0 is 99, but its prompt has"),
        (prompts() | {"word_idxs": {"IO": "first"}}, "position IO .* should be a whole number"),
    ],
)
def test_broken_auto_circuit_json(bpe, tmp_path, content, message):
    with pytest.raises(TranscoderError, match=message) as error:
        from_auto_circuit_json(write_json(tmp_path / "file.json", content), bpe)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "columns, row, message",
    [
        (["clean", "label"], [CLEAN[0], " Mary"], "lacks corrupted: it has clean, label"),
        (["clean", "corrupted", "correct_idx"], [CLEAN[0], CORRUPTED[0], 5], "lacks incorrect_idx"),
        (["clean", "corrupted", "label"], [CLEAN[0], CORRUPTED[0]], "Line 2 .* fewer values than columns"),
        (["clean", "corrupted", "label"], [CLEAN[0], CORRUPTED[0], "Mary Ann"], "not a single token"),
        (["clean", "corrupted", "label"], [CLEAN[0], CLEAN[0] + " the", " Mary"], "give pairs of equal length"),
        (["clean", "corrupted", "correct_idx", "incorrect_idx"], [CLEAN[0], CORRUPTED[0], "x", 5], "'x' in line 2"),
        (
            ["clean", "corrupted", "correct_idx", "incorrect_idx"],
            [CLEAN[0], CORRUPTED[0], 5335, 5],
            "another tokenizer",
        ),
    ],
)
def test_broken_eap_csv(bpe, tmp_path, columns, row, message):
    with pytest.raises(TranscoderError, match=message) as error:
        from_eap_csv(write_csv(tmp_path / "file.csv", columns, [row]), bpe)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "content, message",
    [
        ({"a": 1}, "not a list of"),
        ([], "not a list of"),
        ([["a"]], "Entry 0 .* is not"),
        ([["a", 5]], "Entry 0 .* is not"),
        ([[CLEAN[0], " Mary Ann"]], "not a single token"),
    ],
)
def test_broken_pairs_json(bpe, tmp_path, content, message):
    with pytest.raises(TranscoderError, match=message):
        from_pairs_json(write_json(tmp_path / "file.json", content), bpe)


def test_files_that_cannot_be_read(bpe, tmp_path):
    (tmp_path / "broken").write_bytes(b'\xff\xfe{"a"')
    for read in (from_eap_csv, from_auto_circuit_json, from_pairs_json):
        for name in ("absent", "broken"):
            with pytest.raises(TranscoderError, match="cannot be read|lacks") as error:
                read(tmp_path / name, bpe)
            assert "\n" not in str(error.value)
    one = write_json(tmp_path / "one.json", [[CLEAN[0], " Mary"]])
    two = write_json(tmp_path / "two.json", [[CLEAN[0], " Mary"]] * 2)
    with pytest.raises(TranscoderError, match="give files that match"):
        from_pairs_json(one, bpe, two)


def test_years_as_labels_exclude_token_ids(bpe, tmp_path):
    columns = ["clean", "corrupted", "correct_idx", "incorrect_idx"]
    path = write_csv(tmp_path / "file.csv", columns, [[CLEAN[0], CORRUPTED[0], 5, 6]])
    with pytest.raises(TranscoderError, match="has the answers in correct_idx, not in label"):
        from_eap_csv(path, bpe, label="year")
