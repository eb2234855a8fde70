import pytest

from hf_transcoders.text.printable import printable


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain é 東京 💥", "plain é 東京 💥"),
        ("\x1b[31mred\x1b[0m", "\\x1b[31mred\\x1b[0m"),
        ("bell\a", "bell\\x07"),
        ("\x9b31m", "\\x9b31m"),
        ("\u202eabc\u2066", "\\u202eabc\\u2066"),
        ("a\nb\u2028c", "a\\nb\\u2028c"),
        ("\ud800", "\\ud800"),
        ("\ufeffx", "\\ufeffx"),
        ("\U000e0041", "\\U000e0041"),
    ],
)
def test_what_a_terminal_acts_on_is_escaped(text, shown):
    assert printable(text) == shown
    printable(text).encode()


def test_line_breaks_can_stay():
    assert printable("a\nb\tc", keep="\n") == "a\nb\\tc"
