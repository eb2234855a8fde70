"""Lines are added one by one, and one that was cut is replaced."""

import pytest

from hf_transcoders.errors import TranscoderError
from hf_transcoders.text.json_lines import append_json_line, read_json_lines


def test_lines_come_back_in_order(tmp_path):
    path = tmp_path / "folder" / "lines.jsonl"
    values = [{"a": 1}, {"text": "é\n\u2028"}, {}]
    for value in values:
        append_json_line(path, value)
    assert read_json_lines(path) == values


@pytest.mark.parametrize("whole", [b"", b'{"a": 1}\n', b'{"a": 1}\n{"a": 2}\n'])
@pytest.mark.parametrize("cut", [b"{", b'{"a": 3}', b'{"b": "\xc3'])
def test_a_line_that_was_cut_is_replaced(tmp_path, whole, cut):
    path = tmp_path / "lines.jsonl"
    path.write_bytes(whole + cut)
    before = read_json_lines(path)
    assert len(before) == whole.count(b"\n") and path.read_bytes() == whole + cut
    append_json_line(path, {"c": 4})
    assert read_json_lines(path) == [*before, {"c": 4}]


def test_a_damaged_line_is_named(tmp_path):
    path = tmp_path / "lines.jsonl"
    path.write_bytes(b'{"a": 1}\n[]\n')
    with pytest.raises(TranscoderError, match=r"Line 2 of .*lines\.jsonl"):
        read_json_lines(path)
