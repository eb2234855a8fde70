"""Convert word-level WikiText files back to articles."""

import re


# Paragraphs with more unknown words than this are dropped.
_MAX_UNKNOWN = 0.1

# A heading is between blank lines, unlike a formula that is cut at its equals sign. Only one blank line is matched: a longer
# match would be tried again from every line of a long gap.
_ARTICLE_START = re.compile(r"\n[^\S\n]*\n = (?![=\s]).+ = \n[^\S\n]*\n")
_SECTION_HEADING = re.compile(r"=(?: =)* (.+?) =(?: =)*")


def is_wikitext(text):
    """Whether a text has the layout of WikiText files, recognized by ` = Title = ` lines between blank lines."""
    return _ARTICLE_START.search("\n" + text) is not None


def wikitext_articles(text):
    """
    Split a WikiText file into articles and undo its word splitting.

    Paragraphs in which more than one word in ten is `<unk>` are dropped; headings are kept without their equals signs
    and only where text follows them.

    Args:
        text (`str`):
            Content of a WikiText file, tokenized (`wiki.train.tokens`) or raw.

    Returns:
        `list[str]`: one text per nonempty article, with paragraphs separated by blank lines.
    """
    text = "\n" + text
    starts = [match.start() for match in _ARTICLE_START.finditer(text)]
    bounds = [0, *starts, len(text)]
    articles = [_article(text[start:end]) for start, end in zip(bounds, bounds[1:], strict=False)]
    return [article for article in articles if article]


def _article(text):
    paragraphs, headings = [], []
    for line in text.splitlines():
        words = line.split()
        if not words:
            continue
        heading = _SECTION_HEADING.fullmatch(line.strip())
        if heading:
            level = next(index for index, word in enumerate(words) if word != "=")
            if level == 1 and (paragraphs or headings):
                continue  # a formula cut at its equals sign
            # A heading replaces earlier ones of its level and below without text.
            headings = [entry for entry in headings if entry[0] < level]
            headings.append((level, heading[1].split()))
        elif words.count("<unk>") <= _MAX_UNKNOWN * len(words):
            paragraphs += [detokenize(words) for _, words in headings if "<unk>" not in words]
            headings = []
            paragraphs.append(detokenize(words))
    return "\n\n".join(paragraphs)


_OPENING = re.compile(r"([(\[{$£€#]) ")
_CLOSING = re.compile(r" ([,.;:!?)\]}%]|'(?:s|m|d|re|ve|ll)\b|n't\b)")
_NUMBER_JOIN = re.compile(r" @([-,.])@ ")
# The apostrophe of a contraction is also split from the letter before it: "Don 't".
_CONTRACTION = re.compile(r"n 't\b")
_POSSESSIVE = re.compile(r"s '(?= )")
_DOUBLE_QUOTED = re.compile(r'" ([^"]*?) "')
_NUMBER_RANGE = re.compile(r"(?<=\d) – (?=\d)")


def detokenize(words):
    """
    Detokenizes one WikiText line: `a guest @-@ starring role , 9 @.@ 87 %` becomes `a guest-starring role, 9.87%`.
    """
    text = " ".join(words)
    text = _NUMBER_JOIN.sub(r"\1", text)
    text = _NUMBER_RANGE.sub("–", text)
    text = _DOUBLE_QUOTED.sub(r'"\1"', text)
    text = _CONTRACTION.sub("n't", text)
    text = _POSSESSIVE.sub("s'", text)
    text = _OPENING.sub(r"\1", text)
    return _CLOSING.sub(r"\1", text)
