"""Options made from the source of the trainer's arguments are those made from the classes."""

import pytest

from hf_transcoders.cli import main, outline, plan, sweep
from hf_transcoders.cli import train as train_command
from hf_transcoders.cli.outline import UNKNOWN, declared_fields, fields_of
from hf_transcoders.cli.terminal import Parser
from hf_transcoders.cli.values import truth
from hf_transcoders.training.arguments import TranscoderTrainingArguments


COMMANDS = [train_command, sweep, plan]


def both_parsers(command):
    """The parser made from the source, and the one made from the classes."""
    found, parse = [], Parser.parse_known_args
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            Parser, "parse_known_args", lambda self, *a, **more: found.append(self) or parse(self, *a, **more)
        )
        command.parse([], prog="x")
    source, classes = found
    return source, classes


@pytest.mark.parametrize("command", COMMANDS)
def test_options_from_the_source_are_those_of_the_classes(command):
    source, classes = both_parsers(command)
    assert source.format_help() == classes.format_help()
    assert [action.option_strings for action in source._actions] == [a.option_strings for a in classes._actions]
    unchecked = []
    for ours, theirs in zip(source._actions, classes._actions, strict=True):
        for name in ("dest", "nargs", "const", "metavar", "required"):
            assert getattr(ours, name) == getattr(theirs, name), ours.dest
        if ours.choices is None and ours.type is None and theirs.type is not None:
            unchecked.append(ours.dest)
        elif ours.choices is not None:
            assert list(ours.choices) == list(theirs.choices), ours.dest
        else:
            # Functions that are made for each parser have the same name.
            assert getattr(ours.type, "__qualname__", None) == getattr(theirs.type, "__qualname__", None), ours.dest
    # Objects, which the classes refuse later.
    assert unchecked == ["liger_kernel_config", "parallelism_config", "debug"]


def test_every_field_is_found_with_its_default():
    written = declared_fields(train_command._TRAINER_SOURCE, "TranscoderTrainingArguments")
    real = {name: field for name, field in fields_of(TranscoderTrainingArguments).items() if name != "_n_gpu"}
    assert written.keys() == real.keys()
    known = [name for name in written if written[name].default is not UNKNOWN]
    assert len(known) >= len(written) - 2
    assert all(written[name].default == real[name].default for name in known)


def test_words_for_true_and_false_are_those_of_transformers():
    from transformers.hf_argparser import string_to_bool

    for text in ("yes", "True", "t", "Y", "1", "no", "FALSE", "f", "n", "0"):
        assert truth(text) is string_to_bool(text)


def test_without_sources_mistakes_are_found_by_the_classes(monkeypatch, capsys):
    def missing(path, name):
        raise FileNotFoundError(path)

    monkeypatch.setattr(train_command, "declared_fields", missing)
    assert main(["train", "--learning-rat", "1"]) == 2
    assert "did you mean --learning-rate?" in capsys.readouterr().err


@pytest.mark.parametrize(
    "source",
    [
        "import torch",
        "from .nowhere import Arguments",
        "from no_such_package import Arguments",
        "class Arguments(Base): pass",
    ],
)
def test_a_class_that_the_source_does_not_tell(tmp_path, source):
    path = tmp_path / "module.py"
    path.write_text(source)
    with pytest.raises((LookupError, OSError)):
        declared_fields(path, "Arguments")


def test_a_pipe_is_read_once(tmp_path, monkeypatch):
    """As in `--config <(echo k: 8)`."""
    import os
    import threading

    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    threading.Thread(target=pipe.write_text, args=("k: 8",), daemon=True).start()
    got = []
    monkeypatch.setattr(train_command, "run", lambda args: got.append(args.options.k))
    assert main(["train", "--config", str(pipe)]) == 0 and got == [8]


def test_enumerations_are_read_where_they_are_defined(tmp_path):
    (tmp_path / "kinds.py").write_text("class Kind(ExplicitEnum):\n    A = 'a'\n    B = 'b'\n")
    path = tmp_path / "module.py"
    path.write_text(
        "from .kinds import Kind\nclass Arguments:\n    kind: Kind | str = field(default='a')\n    n: int = 3\n"
    )
    fields = outline.declared_fields(path, "Arguments")
    assert fields["kind"].options == {"choices": ["a", "b"]} and fields["kind"].default == "a"
    assert fields["n"].default == 3 and fields["n"].types == "int"
