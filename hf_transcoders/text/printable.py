"""Text that is safe to print on a terminal: no escape sequences, control characters or marks that turn the direction."""

import unicodedata


# Invisible characters that change what stands beside them (directions, joiners, byte order mark), line and paragraph
# separators, control characters, halves of surrogate pairs, and code points that nobody has assigned.
_UNSAFE = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}


def printable(text: object, keep: str = "") -> str:
    r"""Escape every character that a terminal might act on, as `\x1b` or `\u202e`.

    Args:
        text (`object`): What to print.
        keep (`str`, *optional*): Control characters that stay, such as `"\n"` for text of several lines.
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
