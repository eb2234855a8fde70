import json
import math
import random
from types import MappingProxyType

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


def random_value(rng, depth=0):
    """A random JSON value with numbers of every kind, in dicts, read-only mappings, lists and tuples."""
    kind = rng.randrange(10 if depth < 4 else 6)
    if kind < 2:
        return rng.choice([math.nan, math.inf, -math.inf, 1e308 * 10, -0.0, 5e-324, rng.gauss(0, 1e5)])
    if kind < 6:
        return rng.choice([None, True, rng.randrange(-(2**70), 2**70), "NaN", "é\u2028\x00💥</script>", rng.random()])
    if kind < 8:
        entries = {f"{rng.choice('aé<')}{n}": random_value(rng, depth + 1) for n in range(rng.randrange(4))}
        return MappingProxyType(entries) if rng.random() < 0.3 else entries
    return rng.choice([list, tuple])(random_value(rng, depth + 1) for _ in range(rng.randrange(4)))


def expected(value):
    if isinstance(value, dict | MappingProxyType):
        return {key: expected(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [expected(entry) for entry in value]
    return value if value is None or isinstance(value, str) or abs(value) < math.inf else None


def test_whatever_is_written_is_read_back_by_the_strict_reader():
    rng, written = random.Random(0), ""
    for _ in range(1500):
        value = random_value(rng)
        for options in ({}, {"indent": None, "ensure_ascii": False, "separators": (",", ":")}):
            text = to_json(value, **options)
            assert parse_json(text, "x.json", object) == expected(value)
            written += text
    assert written.count("null") > 500


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
