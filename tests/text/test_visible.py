"""Labels of tokens, in which white space can be seen."""

import pytest

from hf_transcoders.text.visible import visible


# Token -> as a label, and between other tokens.
CASES = {
    "the": ("the", "the"),
    " the": ("␣the", " the"),
    " ": ("␣", "␣"),
    "   ": ("␣␣␣", "␣␣␣"),
    "    return": ("␣␣␣␣return", "␣␣␣␣return"),
    "a b ": ("a b␣", "a b "),
    "\n\n": ("⏎⏎", "⏎⏎"),
    "a\tb\r": ("a⇥b␍", "a⇥b␍"),
    "": ("∅", "∅"),
    "\xa0": (r"\xa0", r"\xa0"),
    "\u200b\ufeff": (r"\u200b\ufeff", r"\u200b\ufeff"),
    "\x00\x1b[": (r"\x00\x1b[", r"\x00\x1b["),
    " Mary - John": ("␣Mary - John", " Mary - John"),
    "<b>東": ("<b>東", "<b>東"),
}


@pytest.mark.parametrize("token, shown", CASES.items())
def test_white_space_can_be_seen(token, shown):
    assert (visible(token), visible(token, in_text=True)) == shown
    assert visible(visible(token)) == visible(token)
