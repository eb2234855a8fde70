"""Escape text for terminals: control characters, escape sequences and marks that change the writing direction."""

import unicodedata


# Unicode categories: control and format characters (directions, joiners, byte order mark), lone surrogates, private and
# unassigned code points, line and paragraph separators.
_UNSAFE = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}


def printable(text: object, keep: str = "") -> str:
    r"""Escape every character that a terminal could interpret, as `\x1b` or `\u202e`.

    Args:
        text (`object`): Text to print.
        keep (`str`, *optional*): Control characters to keep, such as `"\n"` for text of several lines.
    """
    text = str(text)
    if text.isascii() and text.isprintable():
        return text
    return "".join(
        character
        if character in keep or unicodedata.category(character) not in _UNSAFE
        else character.encode("unicode_escape", "surrogatepass").decode("ascii")
        for character in text
    )
