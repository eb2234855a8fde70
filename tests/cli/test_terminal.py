"""What stands in files commands no terminal, and looks like no line of ours."""

import ast
import json
import logging
import shutil
import unicodedata
import warnings
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import hf_transcoders
from hf_transcoders import TranscoderConfig, TranscoderModel, TranscoderSet
from hf_transcoders.cli import main
from hf_transcoders.cli.terminal import echo, print_json, printable_logs
from tests.cli.test_runs import record
from tests.tiny_models import VOCAB_SIZE, tiny_model


# Colour, bell, C1, change of direction, a line of its own, return, a line separator.
EVIL = "\x1b[31mRED\x07\x9b2J\u202e\nFORGED line\rFORGED return\u2028FORGED separator"
CLI = Path(hf_transcoders.__file__).parent / "cli"


def check(captured):
    """Nothing that a terminal acts on, and no line that begins as a value says."""
    text = captured.out + captured.err
    for character in text:
        # Bars return to the start of their line.
        assert unicodedata.category(character) not in ("Cc", "Cf", "Cs", "Zl", "Zp") or character in "\n\r", ascii(
            text
        )
    assert not any(line.startswith("FORGED") for line in text.replace("\r", "\n").split("\n")), ascii(text)
    return text


def test_commands_print_through_one_function():
    found = []
    for path in CLI.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                name = ast.unparse(node.func)
                if name == "print" or name.endswith((".stdout.write", ".stderr.write", "stream.write")):
                    found.append((path.name, name))
    assert found == [("terminal.py", "stream.write")]


def test_echo_and_json(capsys):
    echo(EVIL, 5, None)
    echo(EVIL, error=True)
    echo()
    captured = capsys.readouterr()
    check(captured)
    assert captured.out.count("\n") == 4 and captured.err.count("\n") == 1
    value = {EVIL: [EVIL, "\x7f", float("nan"), Path("x")]}
    print_json(value)
    captured = capsys.readouterr()
    check(captured)
    assert json.loads(captured.out) == {EVIL: [EVIL, "\x7f", None, "x"]} and captured.out.isascii()


def test_a_console_of_another_encoding(monkeypatch):
    import io
    import sys

    stream = io.TextIOWrapper(io.BytesIO(), encoding="latin-1")
    monkeypatch.setattr(sys, "stdout", stream)
    echo("é – 東")
    stream.flush()
    assert stream.buffer.getvalue() == "é \\u2013 \\u6771\n".encode("latin-1")


def test_logs_and_warnings_of_every_library_are_escaped(capsys):
    factory, format_warning = logging.getLogRecordFactory(), warnings.formatwarning
    with printable_logs():
        handler = logging.StreamHandler()
        logger = logging.getLogger("some.library")
        logger.addHandler(handler)
        logger.warning("%s of %d", EVIL, 5)
        logger.removeHandler(handler)
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.showwarning = lambda message, category, file, line, *_: echo_raw(
                warnings.formatwarning(message, category, file, line)
            )
            warnings.warn(EVIL, stacklevel=1)
    check(capsys.readouterr())
    assert logging.getLogRecordFactory() is factory and warnings.formatwarning is format_warning


def echo_raw(text):
    import sys

    sys.stderr.write(text)


def test_own_loggers_escape_without_the_commands(capsys):
    from hf_transcoders.text import logging as ours

    handler = logging.StreamHandler()
    logger = ours.get_logger("hf_transcoders.some.module")
    logger.logger.addHandler(handler)
    logger.warning(f"about {EVIL}")
    logger.logger.removeHandler(handler)
    assert check(capsys.readouterr()).count("\n") == 1


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A model, dictionaries and texts whose every string commands a terminal."""
    folder = tmp_path_factory.mktemp("evil")
    evil_name = EVIL.replace("/", "")
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3} | {
        f"w{i}{EVIL}": i for i in range(4, VOCAB_SIZE)
    }  # fmt: skip
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("|", "removed")
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    ).save_pretrained(folder / "model")
    base = tiny_model("llama")
    base.save_pretrained(folder / "model")
    words = list(vocabulary)[4:]
    text = "|".join(words[i % len(words)] for i in range(600))
    (folder / f"{evil_name}.jsonl").write_text(json.dumps({"text": text, EVIL: EVIL}) + "\n")
    made = {}
    for layer in (0, 1):
        config = TranscoderConfig.for_model(
            base, f"layers.{layer}.mlp.in", f"layers.{layer}.mlp.branch", num_features=32, k=4
        )
        made[f"l{layer}"] = TranscoderModel(config)
    TranscoderSet(made).save_pretrained(folder / "set")
    for name in made:
        path = folder / "set" / name / "config.json"
        config = json.loads(path.read_text())
        config |= {"base_model_name_or_path": EVIL, "training_summary": {EVIL: EVIL, "tokens": 5}}
        path.write_text(json.dumps(config))
    return folder


def words_of(place, *more):
    return [
        "--model", str(place / "model"), "--dtype", "float32", "--device", "cpu", *more
    ]  # fmt: skip


def text_of(place):
    (data,) = place.glob("*.jsonl")
    return ["--data", str(data), "--text-column", "text", "--sequence-length", "16", "--max-tokens", "64"]


def run(place, capsys, *argv, code=0):
    assert main(list(argv)) == code, check(capsys.readouterr())
    text = check(capsys.readouterr())
    assert text.strip()
    return text


def test_commands_on_dictionaries(place, capsys, tmp_path):
    single = tmp_path / "one"
    shutil.copytree(place / "set" / "l1", single)
    prompt = "|".join(f"w{i}{EVIL}" for i in (5, 6, 7))
    graph = ["--transcoders", str(single), *words_of(place)]
    assert "\\x1b[31mRED" in run(place, capsys, "info", "--transcoders", str(place / "set"))
    run(
        place,
        capsys,
        "evaluate",
        "--transcoders",
        str(place / "set"),
        *words_of(place),
        *text_of(place),
        "--loss-tokens",
        "16",
    )
    assert "\\x1b[31mRED" in run(
        place,
        capsys,
        "features",
        "--transcoders",
        str(single),
        *words_of(place),
        *text_of(place),
        "--max-features",
        "2",
        "--contexts",
        "2",
    )
    run(place, capsys, "graph", prompt, *graph, "--output", str(tmp_path / "graph"), "--validate", "4")
    run(place, capsys, "paths", prompt, *graph, "--steps", "2", "--graph")
    run(
        place, capsys, "study", "blind", "--transcoders", str(place / "set"), "--dictionary", "l1", *words_of(place), *text_of(place),
        "--max-features", "2", "--null-features", "3", "--bootstrap-samples", "3", "--heads", "1",
    )  # fmt: skip
    replacement = [
        "study",
        "replacement",
        "--transcoders",
        str(place / "set"),
        *words_of(place),
        *text_of(place),
        "--loss-tokens",
        "16",
    ]
    run(place, capsys, *replacement, "--output", str(tmp_path / "replacement"))


def test_mistakes_about_what_files_say(place, capsys, tmp_path):
    """Sentences on stderr with values of files in them."""
    shutil.copytree(place / "set", tmp_path / "set")
    config = tmp_path / "set" / "l0" / "config.json"
    original = json.loads(config.read_text())
    index = tmp_path / "set" / "transcoder_set.json"
    names = index.read_text()
    index.write_text(names.replace('"l0"', json.dumps(EVIL), 1))
    run(place, capsys, "info", "--transcoders", str(tmp_path / "set"), code=2)
    index.write_text(names)
    for change in ({"activation": EVIL}, {"input_site": EVIL}, {"format_version": EVIL}, {"k": EVIL}, {EVIL: EVIL}):
        config.write_text(json.dumps(original | change))
        main(["info", "--transcoders", str(tmp_path / "set")])
        check(capsys.readouterr())
    config.write_text(json.dumps(original))
    run(place, capsys, "features", "--transcoders", str(tmp_path / "set"), code=2)
    run(place, capsys, "evaluate", "--transcoders", str(tmp_path / "set"), *text_of(place), code=2)
    run(
        place,
        capsys,
        "evaluate",
        "--transcoders",
        str(tmp_path / "set"),
        *words_of(place),
        *text_of(place)[:2],
        "--text-column",
        EVIL,
        code=2,
    )
    (tmp_path / "run.yaml").write_text(json.dumps({EVIL: 1}))
    run(place, capsys, "train", "--config", str(tmp_path / "run.yaml"), code=2)
    (tmp_path / "run.yaml").write_text(json.dumps({"activation": EVIL}))
    run(place, capsys, "train", "--config", str(tmp_path / "run.yaml"), code=2)
    run(place, capsys, "info", "--transcoders", EVIL, code=2)
    run(place, capsys, "evaluate", "--transcoders", EVIL, f"--{EVIL}", code=2)
    run(place, capsys, EVIL, code=2)
    run(place, capsys, "tasks", "show", EVIL, "--model", str(place / "model"), code=2)
    run(place, capsys, "push", EVIL, "me/x", code=2)


def test_records_of_runs(capsys, tmp_path):
    runs = tmp_path / "runs"
    record(runs / "a", 16, 0.4)
    record(runs / "b", 32, 0.3)
    for name in ("a", "b"):
        path = runs / name / "tracking" / "run.json"
        facts = json.loads(path.read_text())
        (sites,) = facts["dictionaries"].values()
        facts |= {"name": f"$\\frac{{{name}{EVIL}", "base_model": EVIL, "dictionaries": {EVIL: sites}}
        facts["arguments"] |= {EVIL: name, "learning_rate": f"{name}{EVIL}"}
        facts["evaluation_protocol"] |= {"dataset": f"{name}{EVIL}", "base_model": EVIL}
        path.write_text(json.dumps(facts))
        scalars = runs / name / "tracking" / "scalars.jsonl"
        scalars.write_text(scalars.read_text().replace("layers.8.mlp.transcoder", json.dumps(EVIL)[1:-1]))
    (runs / "broken\x1b[2J" / "tracking").mkdir(parents=True)
    (runs / "broken\x1b[2J" / "tracking" / "run.json").write_text(json.dumps({"name": EVIL})[:-9])
    assert "damaged" in run(tmp_path, capsys, "runs", "list", str(runs))
    run(tmp_path, capsys, "runs", "compare", str(runs / "a"), str(runs / "b"))
    run(tmp_path, capsys, "runs", "pareto", str(runs / "a"), str(runs / "b"), "--output", str(tmp_path / "x"), "--csv")


def test_formulas_of_names_are_text_in_csv(tmp_path, capsys):
    import csv

    record(tmp_path / "runs" / "a", 16, 0.4)
    path = tmp_path / "runs" / "a" / "tracking" / "run.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"name": '=HYPERLINK("http://x")'}))
    assert main(["runs", "pareto", str(tmp_path / "runs"), "--output", str(tmp_path / "x"), "--csv"]) == 0
    with open(tmp_path / "x" / "pareto.csv", newline="") as file:
        (row,) = csv.DictReader(file)
    assert row["run"] == '\'=HYPERLINK("http://x")' and float(row["l0"]) == 16
