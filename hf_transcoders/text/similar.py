"""Name the word that was probably meant."""

import difflib
from collections.abc import Iterable


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return a question for the most similar known word, to append to a message; empty if none is similar."""
    similar = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f": did you mean {similar[0]}?" if similar else ""
