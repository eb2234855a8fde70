"""Values of the command line and of YAML files: of their types, in their ranges, and writable, before any work."""

import argparse
import collections
import functools
import importlib
import itertools
import json
from dataclasses import fields
from typing import get_args

import pytest
from transformers import AutoModelForCausalLM

from hf_transcoders.circuits.patching.ablations import ABLATIONS
from hf_transcoders.cli import main
from hf_transcoders.cli import train as train_command
from hf_transcoders.cli.arguments import SHARED
from hf_transcoders.cli.common import base_model_of
from hf_transcoders.cli.main import _COMMANDS
from hf_transcoders.cli.terminal import Parser
from hf_transcoders.cli.values import device, unicode_text, whole, whole_number
from hf_transcoders.errors import TranscoderError
from hf_transcoders.formats.detect import WRITERS
from hf_transcoders.lm.sites import HEAD_POINTS, Site
from hf_transcoders.models.configuration_transcoder import TranscoderConfig
from hf_transcoders.studies.circuit_reuse.repair_search import OBJECTIVES


def sentence(capsys):
    captured = capsys.readouterr()
    lines = captured.err.strip().splitlines()
    assert len(lines) == 1 and not captured.out, captured
    return lines[0]


class _Seen(Exception):
    pass


@functools.cache
def parsers(command):
    """The parser of a command and those of its actions."""
    found = []

    def keep(self, *args, **kwargs):
        found.append(self)
        raise _Seen

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Parser, "parse_args", keep)
        patch.setattr(Parser, "parse_known_args", keep)
        # Its parser is compared with that of the classes in test_outline.py.
        patch.setattr(train_command, "refuse_mistakes", lambda *args, **texts: None)
        module = importlib.import_module(f"hf_transcoders.cli.{command}")
        for argv in ([], *([[action] for action in getattr(module, "_ACTIONS", ())])):
            with pytest.raises(_Seen):
                module.parse(argv, prog=command)
    actions = [action for parser in found for action in parser._actions]
    nested = [a.choices.values() for a in actions if isinstance(a, argparse._SubParsersAction)]
    return [*found, *itertools.chain(*nested)]


@pytest.mark.parametrize("command", [name for name in _COMMANDS if name not in ("train", "sweep", "plan")])
def test_every_number_has_a_range(command):
    counted = 0
    for parser in parsers(command):
        for action in parser._actions:
            assert action.type not in (int, float), action.dest
            if action.type in (None, device, unicode_text):
                continue
            counted += 1
            for text in ("x", "", "nan", "inf", "-inf", "1e400", "-9" * 30, "9" * 30, "9" * 5000, "0x10", "\x1b[31m"):
                with pytest.raises(argparse.ArgumentTypeError):
                    action.type(text)
    assert counted or command in ("push", "runs", "info", "study")


def long_options():
    """(name with hyphens, action, parser) for every long option of every command, hidden ones included."""
    for command in _COMMANDS:
        for parser in parsers(command):
            for action in parser._actions:
                for option in action.option_strings:
                    if option.startswith("--"):
                        yield option.replace("_", "-"), action, parser


def test_options_of_one_name_mean_the_same_everywhere():
    """One help, to which a command may add after a semicolon, one name of the value and one type."""
    meanings, commands = collections.defaultdict(set), collections.defaultdict(set)
    for name, action, parser in long_options():
        text = action.help
        if text == argparse.SUPPRESS:
            # Only `--help-all` shows it.
            continue
        if option := SHARED.get(action.dest):
            assert text == option.help or text.startswith(f"{option.help}; "), (parser.prog, name, text)
            text = option.help
        # Without a type, a value is a string.
        type_ = getattr(action.type or str, "__qualname__", action.type)
        meanings[name].add((text, action.metavar, type_))
        commands[name].add(parser.prog)
    assert len(meanings) > 90 and all(len(commands[f"--{name.replace('_', '-')}"]) > 1 for name in SHARED)
    differing = {name: found for name, found in meanings.items() if len(found) > 1}
    assert not differing


def test_every_long_option_is_taken_with_hyphens_and_with_underscores(monkeypatch):
    taken = 0
    for name, action, parser in long_options():
        if action.dest in ("help", "help_all"):
            continue
        # Required arguments are left out, and only the name of this one is tested.
        monkeypatch.setattr(parser, "_actions", [a for a in parser._actions if a.option_strings and not a.required])
        for attribute in ("type", "choices"):
            monkeypatch.setattr(action, attribute, None)
        values = [] if action.nargs == 0 else ["1"] * (action.nargs if isinstance(action.nargs, int) else 1)
        hyphens, underscores = (
            parser.parse_known_args([spelling, *values]) for spelling in (name, f"--{name[2:].replace('-', '_')}")
        )
        assert hyphens == underscores and hyphens[1] == [], (parser.prog, name)
        assert underscores != parser.parse_known_args([]) or action.default in ("1", 1, ["1"]), (parser.prog, name)
        taken += "-" in name[2:]
    assert taken > 300


@pytest.mark.parametrize(
    ("text", "number"),
    [("7", 7), ("-1", -1), ("1_000_000", 10**6), ("1M", 10**6), ("1m", 10**6), ("1e6", 10**6), ("1.5e3", 1500), ("2.5k", 2500),
     ("3B", 3 * 10**9), (" 8 ", 8)],
)  # fmt: skip
def test_whole_numbers_as_people_write_them(text, number):
    assert whole_number(text) == number


@pytest.mark.parametrize(
    "text",
    ["eight", "1.5", "4.0", "1,2", "1,000", "", "0x10", "1e-3", "1.2345k", "1e99", "nan", "1_", "--1", "٣", "M"],
)
def test_what_is_no_whole_number(text):
    with pytest.raises(argparse.ArgumentTypeError):
        whole(-(2**31))(text)


def test_layers_count_from_the_end(folder):
    model = AutoModelForCausalLM.from_pretrained(folder / "model")

    def layers(*numbers):
        options = train_command.RunOptions(layers=list(numbers))
        return [Site.parse(read).layer for read, _ in train_command.sites_of(options, model)]

    assert layers(-1) == [2] and layers(0, -1, -3) == [0, 2] and layers(1, 2) == [1, 2]
    for number in (3, -4):
        with pytest.raises(TranscoderError, match=f"There is no layer {number}: .* 0 to 2, and -1 is the last"):
            layers(number)


def test_choices_are_those_of_the_library(capsys):
    listed = (
        (["circuits", "patch"], ABLATIONS),
        (["circuits", "patch"], HEAD_POINTS),
        (["circuits", "repair"], OBJECTIVES),
        (["convert"], WRITERS),
    )
    for command, names in listed:
        with pytest.raises(SystemExit):
            main([*command, "--help"])
        shown = " ".join(capsys.readouterr().out.split()).replace("- ", "-")
        assert ", ".join(names) in shown


@pytest.mark.parametrize("field", ["activation", "normalization", "loss_reduction"])
def test_training_takes_the_values_of_the_configuration(field, capsys):
    (values,) = [get_args(each.type) for each in fields(TranscoderConfig) if each.name == field]
    assert len(values) > 2
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    assert f"--{field.replace('_', '-')} {{{','.join(values)}}}" in capsys.readouterr().out
    for value in values:
        parsed = train_command.parse([f"--{field.replace('_', '-')}", value], "train")
        assert getattr(parsed.options, field) == value


def test_help_shows_hyphens_only():
    for _, action, parser in long_options():
        assert not [option for option in action.option_strings if "_" in option], parser.prog


def test_words_after_two_hyphens_and_values_keep_their_spelling():
    parser = Parser(prog="x")
    parser.add_argument("text", nargs="*")
    parser.add_argument("--max-tokens")
    parsed = parser.parse_args(["--max_tokens=a_b-c", "--", "--max_tokens", "--other_word"])
    assert parsed.max_tokens == "a_b-c" and parsed.text == ["--max_tokens", "--other_word"]
    with pytest.raises(TranscoderError, match="--other_word"):
        parser.parse_args(["--other_word"])


@pytest.mark.parametrize(
    ("argv", "option"),
    [
        (["evaluate", "--transcoders", "x", "--batch-size", "0"], "--batch-size"),
        (["evaluate", "--transcoders", "x", "--skip-first", "-1"], "--skip-first"),
        (["evaluate", "--transcoders", "x", "--max-tokens", "0"], "--max-tokens"),
        (["evaluate", "--transcoders", "x", "--sequence-length", "1"], "--sequence-length"),
        (["evaluate", "--transcoders", "x", "--device", "nope"], "--device"),
        (["evaluate", "--transcoders", "x", "--device", "meta"], "--device"),
        (["evaluate", "--transcoders", "x", "--device", "cuda:99"], "--device"),
        (["features", "--transcoders", "x", "--contexts", "0"], "--contexts"),
        (["features", "--transcoders", "x", "--features", "3", "-1"], "--features"),
        (["graph", "x", "--transcoders", "y", "--nodes", "1.5"], "--nodes"),
        (["graph", "x", "--transcoders", "y", "--edges", "nan"], "--edges"),
        (["graph", "\udcff", "--transcoders", "y"], "prompt"),
        (["paths", "x", "--transcoders", "y", "--steps", "0"], "--steps"),
        (["tasks", "measure", "ioi", "--model", "x", "--confidence", "1"], "--confidence"),
        (["tasks", "show", "ioi", "--model", "x", "--seed", "-1"], "--seed"),
        (["circuits", "patch", "ioi", "--model", "x", "--prompts", "0"], "--prompts"),
        (["circuits", "reuse", "--model", "x", "--repair-prompts", "0"], "--repair-prompts"),
        (["study", "blind", "--transcoders", "x", "--window", "0"], "--window"),
        (["study", "replacement", "--transcoders", "x", "--loss-tokens", "0"], "--loss-tokens"),
        (["study", "greater-than", "--transcoders", "x", "--max-k", "0"], "--max-k"),
        (["demo", "--k", "0"], "--k"),
        (["plan", "--processes", "0"], "--processes"),
        (["plan", "--device_memory", "-1"], "--device-memory"),
        (["plan", "--tflops", "inf"], "--tflops"),
        (["sweep", "--group-size", "0"], "--group-size"),
        (["train", "--learning_rate", "nan"], "learning_rate"),
        (["train", "--learning_rate", "inf"], "learning_rate"),
        (["train", "--k", "3.7"], "--k"),
        (["train", "--skip_connection", "5"], "--skip-connection"),
        (["train", "--per_device_train_batch_size", "0"], "per_device_train_batch_size"),
        (["train", "--sequence_length", "0"], "--sequence-length"),
        (["train", "--gradient_accumulation_steps", "0"], "gradient_accumulation_steps"),
        (["train", "--dead_after_tokens", "-1"], "dead_after_tokens"),
        (["train", "--outlier_factor", "-1"], "outlier_factor"),
        (["train", "--activation_cache_gb", "nan"], "activation_cache_gb"),
        (["train", "--max_grad_norm", "-1"], "max_grad_norm"),
        (["train", "--seed", "1" + "0" * 30], "--seed"),
        (["train", "--accelerator_config", '{"a": 1}'], "options of the trainer"),
        (["evaluate"], "--transcoders"),
        (["nonsense"], "nonsense"),
        (["--nonsense"], "--nonsense"),
        (["--debug", "info"], "command comes first"),
    ],
)  # fmt: skip
def test_values_out_of_range_are_one_sentence(capsys, argv, option):
    assert main(argv) == 2
    assert option in sentence(capsys)


@pytest.mark.parametrize(
    "argv",
    [
        ["evaluate", "--transcoders", "x", "--output"],
        ["study", "blind", "--transcoders", "x", "--output"],
        ["runs", "pareto", "--output"],
        ["graph", "x", "--transcoders", "y", "--output"],
        ["circuits", "patch", "ioi", "--model", "x", "--output"],
        ["circuits", "reuse", "--model", "x", "--output"],
        ["study", "greater-than", "--transcoders", "x", "--output"],
        ["study", "replacement", "--transcoders", "x", "--output"],
        ["tasks", "show", "ioi", "--model", "x", "--output"],
        ["train", "--model", "x", "--output-dir"],
        ["sweep", "--model", "x", "--output_dir"],
        ["demo", "--output"],
    ],
)
def test_where_results_cannot_go_is_found_out_first(tmp_path, capsys, argv):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "below", tmp_path / "file" / "far" / "below"):
        assert main([*argv, str(path)]) == 2
        assert "give another --output" in sentence(capsys)
    assert {path.name for path in tmp_path.iterdir()} == {"file"}


def yaml_of(monkeypatch, tmp_path, text, command="train"):
    """What a YAML file makes of the options."""
    got = {}
    monkeypatch.setattr(train_command, "run", lambda args: got.update({**vars(args.options), **vars(args.training)}))
    path = tmp_path / "run.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return main([command, "--config", str(path)]), got


@pytest.mark.parametrize(
    "text",
    [
        "learning_rate: true", "learning_rate: yes", "k: 010", "k: 0x10", "k: 0o10", "num_features: 1:30", "k: 3.7", "k: 4.0",
        "k: {a: 1}", "k: [4, 8]", "k: null x", "k: 2020-01-01", "k: .nan", "learning_rate: .inf", "learning_rate: nan",
        "learning_rate: 1:30", "seed: yes", "seed: true", "skip_connection: 5", "skip_connection: maybe", "skip_connection: 0.5",
        "model: 3", "model: true", "model: 2020-01-01", "model: [a]", "model: {a: b}", "output_dir: 3", "output_dir: 1.5",
        "output_dir: no", "revision: 1234567", "activation: 3", "activation: yes", "layers: [1, true]", "layers: [1, 010]",
        "layers: []", "layers: [[1]]", "kind: [sae, 5]", "k: 4\nk: 8", "num_features: 4\nnum-features: 8", "1: 2", "yes: 2",
        "null: 2", "[1]: 2", "help: true", "config: x", "json: 5", "json: maybe", "learning_rate: null", "bf16: 2",
        "lr_scheduler_kwargs: [1]", "lr_scheduler_kwargs: {a: 2020-01-01}", "k: !!int x", "k: !!python/name:os.system x",
        "k: !!binary aGk=", "a: b: c", "- k", "k", "3", "", b"k: \xff", "k: &a [*a]", "k: " + "[" * 3000, "\x00",
        "k: " + "9" * 5000, "skip_special_tokens: 5",
    ],
)  # fmt: skip
def test_yaml_values_that_do_not_fit_are_refused(monkeypatch, tmp_path, capsys, text):
    code, got = yaml_of(monkeypatch, tmp_path, text)
    assert code == 2 and not got, got
    assert "run.yaml" in (line := sentence(capsys)) or "nan" in line
    assert len(line) < 900


@pytest.mark.parametrize(
    ("text", "name", "value"),
    [
        ("learning_rate: 1e-3", "learning_rate", 1e-3), ("learning_rate: 2", "learning_rate", 2.0), ("k: 64", "k", 64), ("k: 1e3", "k", 1000), ("max_tokens: 1M", "max_tokens", 1_000_000),
        ('k: "64"', "k", 64), ("num_features: 1_024", "num_features", 1024), ("num-features: 8", "num_features", 8),
        ("layers: 3", "layers", [3]), ("layers: [1, 2]", "layers", [1, 2]), ("kind: [sae, transcoder]", "kind", ["sae", "transcoder"]),
        ("skip_connection: true", "skip_connection", True), ("skip_connection: off", "skip_connection", False),
        ("skip_connection: 1", "skip_connection", True), ("skip_special_tokens: false", "skip_special_tokens", False),
        ('model: "3"', "model", "3"), ("model: a/b", "model", "a/b"), ("output_dir: runs/x", "output_dir", "runs/x"),
        ('revision: "1234567"', "revision", "1234567"), ("text_column: null", "text_column", None), ("text_column:", "text_column", None),
        ("report_to: none", "report_to", []), ("save_strategy: 'no'", "save_strategy", "no"), ("save_steps: 0.5", "save_steps", 0.5),
        ("target_l0: 16", "target_l0", 16.0), ("use_cpu: yes", "use_cpu", True), ("resume: last", "resume", "last"),
        ("lr_scheduler_kwargs: {a: 1, b: {c: x}}", "lr_scheduler_kwargs", {"a": 1, "b": {"c": "x"}}),
        ("lr_scheduler_kwargs: '{\"a\": 1}'", "lr_scheduler_kwargs", {"a": 1}),
        ("\ufeffk: 5", "k", 5), ("x: &x {k: 6}\n<<: *x", None, None),
    ],
)  # fmt: skip
def test_yaml_values_are_those_of_the_command_line(monkeypatch, tmp_path, capsys, text, name, value):
    code, got = yaml_of(monkeypatch, tmp_path, text)
    if name is None:
        assert code == 2 and "'x' that does not exist" in sentence(capsys)
        return
    assert code == 0, capsys.readouterr().err
    assert got[name] == value and type(got[name]) is type(value) or name == "save_strategy"


def test_yaml_and_command_line_agree(monkeypatch, tmp_path):
    options = {
        "layers": [1, 2], "num_features": 512, "k": 16, "learning_rate": 3e-4, "bf16": False, "max_tokens": 10_000, "seed": 7,
        "model": "some/model", "report_to": ["none"], "sequence_length": 64, "skip_connection": True, "warmup_steps": 0.1,
    }  # fmt: skip
    _, from_yaml = yaml_of(monkeypatch, tmp_path, json.dumps(options | {"output_dir": str(tmp_path / "out")}))
    got = {}
    monkeypatch.setattr(train_command, "run", lambda args: got.update({**vars(args.options), **vars(args.training)}))
    words = []
    for name, value in options.items():
        words += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    assert main(["train", *words, "--output_dir", str(tmp_path / "out")]) == 0
    assert got.keys() == from_yaml.keys()
    differing = {name for name in got if str(got[name]) != str(from_yaml[name])}
    assert not differing - {"logging_dir", "distributed_state", "_n_gpu"}, differing


@pytest.mark.parametrize(
    "name", ["../models/base", "/absent/place", "./model", "a/b/c", "folder with blanks", "\x1b[31m"]
)
def test_a_base_model_that_is_elsewhere(monkeypatch, tmp_path, name):
    class Dictionaries:
        base_model_name_or_path = name

    monkeypatch.chdir(tmp_path)
    with pytest.raises(TranscoderError, match=r"by --model\.$"):
        base_model_of(Dictionaries(), None)
    assert base_model_of(Dictionaries(), "given") == "given"


def test_a_base_model_by_a_path_that_looks_like_an_id(tmp_path, monkeypatch, capsys):
    from hf_transcoders import TranscoderSet
    from tests.models.reference_dictionary import make_model

    model = make_model("topk")
    model.config.input_site, model.config.output_site = "layers.1.mlp.in", "layers.1.mlp.branch"
    model.config.base_model_name_or_path = "models/base"
    TranscoderSet({"a": model}).save_pretrained(tmp_path / "set")
    monkeypatch.chdir(tmp_path)
    assert main(["evaluate", "--transcoders", "set", "--device", "cpu"]) == 2
    assert "give by --model" in sentence(capsys)
