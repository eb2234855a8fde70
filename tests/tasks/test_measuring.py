"""Measuring in batches equals measuring prompt by prompt, and the command prints the same numbers."""

import json

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from hf_transcoders import TranscoderError
from hf_transcoders.cli import main
from hf_transcoders.tasks import TASKS, Task, end_logits, indirect_object_identification, measure


@pytest.fixture(scope="module")
def model(tokenizers):
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(tokenizers("byte_level_bpe")),
        n_embd=32,
        n_layer=2,
        n_head=2,
        n_positions=64,
        initializer_range=0.4,
    )
    return GPT2LMHeadModel(config).eval()


@pytest.fixture(scope="module")
def task(tokenizers):
    return indirect_object_identification(tokenizers("byte_level_bpe"), size=40, corruption="s2_io_flip")


def test_measure_equals_one_prompt_at_a_time(model, task):
    result = measure(model, task, batch_size=7)
    differences, ranks, right, divergences = [], [], [], []
    with torch.no_grad():
        for row in task.dataset:
            clean, corrupted = (
                model(torch.tensor([row[f"{which}_ids"]])).logits[0, -1] for which in ("clean", "corrupted")
            )
            answer, other = row["answer_ids"][0], row["wrong_ids"][0]
            differences.append((clean[answer] - clean[other]).item())
            ranks.append((clean > clean[answer]).sum().item() + 1)
            right.append(differences[-1] > 0)
            p, q = clean.log_softmax(-1), corrupted.log_softmax(-1)
            divergences.append((p.exp() * (p - q)).sum().item())
    assert result["clean"]["logit_difference"].mean == pytest.approx(sum(differences) / 40, rel=1e-5, abs=1e-6)
    assert result["clean"]["rank"].mean == sum(ranks) / 40
    assert result["clean"]["candidate_accuracy"].mean == sum(right) / 40
    assert result["clean"]["candidate_accuracy"].method == "wilson"
    assert result["corrupted"]["kl"].mean == pytest.approx(sum(divergences) / 40, rel=1e-4)
    assert "kl" not in result["clean"]


def test_batches_do_not_matter(model, task):
    one, other = measure(model, task, batch_size=40), measure(model, task, batch_size=3)
    for which, metrics in one.items():
        for name, figure in metrics.items():
            for field in ("mean", "low", "high"):
                assert getattr(figure, field) == pytest.approx(getattr(other[which][name], field), rel=1e-4, abs=1e-6)


def test_end_need_not_be_the_last_token(model, tokenizers):
    """A file can give the position of the answer, with padding after it."""
    texts = ["Then, John and Mary went to the store.", "John and Mary went"]
    task = Task.from_pairs(
        tokenizers("byte_level_bpe"), texts, None, [" to", " to"], positions={"END": ["Mary", "Mary"]}
    )
    logits = end_logits(model, task)
    for row, got in zip(task.dataset, logits, strict=True):
        with torch.no_grad():
            whole = model(torch.tensor([row["clean_ids"]])).logits[0]
        torch.testing.assert_close(got, whole[row["positions"]["END"]])


def test_a_task_without_wrong_answers(model, tokenizers):
    task = Task.from_pairs(tokenizers("byte_level_bpe"), ["John went", "Mary went"], None, [" to", " to"])
    assert set(measure(model, task)) == {"clean"}
    assert set(measure(model, task)["clean"]) == {"accuracy", "candidate_accuracy", "rank"}


def test_a_model_that_does_not_fit(task):
    small = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=8, n_layer=1, n_head=1, n_positions=64))
    with pytest.raises(
        TranscoderError, match=r"does not know \(its tokens are 0 to 49\): use the model's own tokenizer"
    ):
        measure(small, task)
    with pytest.raises(TranscoderError, match="batch_size is 0"):
        measure(small, task, batch_size=0)


@pytest.fixture(scope="module")
def folder(model, tokenizers, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    tokenizers("byte_level_bpe").save_pretrained(folder)
    return str(folder)


def test_list_names_every_task(capsys):
    assert main(["tasks", "list"]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in TASKS) and "--corruption (default abc)" in printed
    assert main(["tasks", "list", "--json"]) == 0
    listed = {entry["name"]: entry["options"] for entry in json.loads(capsys.readouterr().out)}
    assert list(listed) == list(TASKS) and listed["ioi"] == ["corruption", "templates"]


def test_show(folder, capsys, tmp_path, tokenizers):
    command = [
        "tasks",
        "show",
        "ioi",
        "--model",
        folder,
        "--prompts",
        "2",
        "--corruption",
        "s2_io_flip",
        "--seed",
        "3",
    ]
    assert main(command) == 0
    printed = capsys.readouterr().out
    task = indirect_object_identification(tokenizers("byte_level_bpe"), 2, "s2_io_flip", seed=3)
    for row in task.dataset:
        io, s = row["metadata"]["io"], row["metadata"]["s"]
        assert f"[S1: {s}]" in printed and f"[IO: {io}]" in printed and f"[S2: {io}]" in printed
        assert f"right     ' {io}'" in printed and f"wrong     ' {s}'" in printed
    assert main([*command, "--json", "--output", str(tmp_path / "task")]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["settings"] == task.settings
    assert [row["clean_ids"] for row in shown["rows"]] == task.dataset["clean_ids"][:]
    assert shown["rows"][0]["answers"] == [f" {task[0]['metadata']['io']}"]
    assert Task.load(tmp_path / "task").dataset[:] == task.dataset[:]


def test_measure_command(folder, model, task, capsys):
    command = [
        "tasks", "measure", "ioi", "--model", folder, "--prompts", "40", "--corruption", "s2_io_flip",
        "--dtype", "float32", "--device", "cpu",
    ]  # fmt: skip
    assert main([*command, "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    expected = measure(model, task)
    assert printed["protocol"]["corruption"] == "s2_io_flip" and printed["protocol"]["size"] == 40
    for which in ("clean", "corrupted"):
        assert printed[which] == {name: figure.to_dict() for name, figure in expected[which].items()}
    assert main(command) == 0
    table = capsys.readouterr().out
    assert str(expected["clean"]["logit_difference"]) in table and "Wilson" in table


@pytest.mark.parametrize(
    "words, message",
    [
        (["show", "ioo"], "There is no task 'ioo': choose from ioi, "),
        (["show", "ioi", "--structure", "simple"], "The task 'ioi' has no --structure"),
        (["show", "ioi", "--corruption", "flip"], "no corruption 'flip'"),
        (
            ["measure", "ioi", "--device", "cpu", "--batch-size", "0"],
            "--batch-size: 0 is out of range; give at least 1",
        ),
    ],
)
def test_mistakes_are_one_sentence(folder, capsys, words, message):
    assert main(["tasks", *words, "--model", folder]) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error
    if words[0] == "show" and words[1] == "ioi":
        assert len(error.strip().splitlines()) == 1


def test_a_model_that_does_not_exist(tmp_path, capsys):
    assert main(["tasks", "show", "ioi", "--model", str(tmp_path / "absent")]) == 2
    assert "There is no folder" in capsys.readouterr().err
