import json

import pytest

from hf_transcoders.errors import TranscoderError
from hf_transcoders.text.strict_json import parse_json, read_json, read_yaml, to_json


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "null",
        "[1]",
        '"text"',
        "NaN",
        '{"a": NaN}',
        '{"a": -Infinity}',
        '{"a": 1e400}',
        '{"a": 1' + "0" * 5000 + "}",
        "[" * 100_000,
        '{"a":' * 100_000,
        '{"a": 1, "a": 2}',
        '{"a": "\\ud800"}',
        b"\xff\xfe",
        b'{"a": "\xff"}',
    ],
)
def test_what_is_not_a_json_object_is_refused_in_one_sentence(text):
    with pytest.raises(TranscoderError, match=r"^somewhere/x\.json [^\n]*\.$"):
        parse_json(text, "somewhere/x.json")


def test_json_is_read_as_python_reads_it(tmp_path):
    value = {"a": [1, 2.5, None, True, "é\u2028💥"], "b": {"c": {}}}
    (tmp_path / "x.json").write_bytes(b"\xef\xbb\xbf" + json.dumps(value).encode())
    assert read_json(tmp_path / "x.json") == value
    assert parse_json("[1]", "x", list) == [1] and parse_json("null", "x", object) is None
    assert parse_json('{"loss": NaN}', "x", allow_nan=True)["loss"] != 0


def test_a_missing_file_is_one_sentence(tmp_path):
    with pytest.raises(TranscoderError, match="No such file"):
        read_json(tmp_path / "absent.json")
    with pytest.raises(TranscoderError, match="No such file"):
        read_yaml(tmp_path / "absent.yaml")


def test_numbers_that_are_not_finite_are_written_as_null():
    assert json.loads(to_json({"a": float("nan"), "b": (1.0, float("inf"))})) == {"a": None, "b": [1.0, None]}


@pytest.mark.parametrize(
    "text",
    [
        "a: 1\na: 2",
        "a: [",
        "a: !!int x",
        "a: !!python/object/apply:os.getcwd []",
        "[1, 2]",
        "? [a]\n: 1",
        "a: " + "[" * 5000,
        "\x00",
    ],
)
def test_what_is_not_a_yaml_mapping_is_refused_in_one_sentence(tmp_path, text):
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(TranscoderError, match=r"x\.yaml [^\n]*\.$"):
        read_yaml(tmp_path / "x.yaml")


def test_yaml_is_read(tmp_path):
    (tmp_path / "x.yaml").write_text("base: &b {k: 1}\nother: {<<: *b, l: [x, 2.5]}\n")
    assert read_yaml(tmp_path / "x.yaml") == {"base": {"k": 1}, "other": {"k": 1, "l": ["x", 2.5]}}
