"""Show tokens so that spaces, line breaks and characters without a shape can be seen."""

import re


_SIGNS = {"\n": "⏎", "\r": "␍", "\t": "⇥"}
# White space other than the space, and characters of no width.
_HIDDEN = re.compile("[\x00-\x1f\x7f-\xa0\xad\u1680\u2000-\u200f\u2028-\u202f\u205f-\u206f\u3000\ufeff]")
_END_SPACES = re.compile("^ +| +$")
_WIDE_SPACES = re.compile("^ +$| {2,}")


def visible(text: str, *, in_text: bool = False) -> str:
    r"""A token as a label, in which every white space can be seen: `␣the`, `⏎`, `⇥`, `\xa0`.

    The script of the graph page has the same function (`visible` in `data.js`), which a test compares with this one.

    Args:
        text (`str`): The token.
        in_text (`bool`, *optional*, defaults to `False`):
            Whether the token stands between quotation marks or other tokens, where single spaces can be seen: of spaces,
            only several in a row, and those of a token without anything else, become signs.

    Returns:
        `str`: the label; `∅` for an empty text.
    """
    text = _HIDDEN.sub(_sign, text)
    return (_WIDE_SPACES if in_text else _END_SPACES).sub(lambda found: "␣" * len(found[0]), text) or "∅"


def _sign(found):
    character = found[0]
    return _SIGNS.get(character) or character.encode("unicode_escape").decode("ascii")
