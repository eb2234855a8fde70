"""Decode tokens to distinguishable texts."""

import re
from collections.abc import Sequence


_BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")


def token_texts(tokenizer, ids: Sequence[int]) -> list[str]:
    r"""
    Decodes each token on its own.

    Tokens that are part of a character are shown as bytes, `\xe6\x9d`, and ids that the tokenizer does not have, such as
    padding rows of a vocabulary, as `<id 50300>`. Leading spaces that SentencePiece decoders drop are kept.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): Tokenizer of the base model.
        ids (`Sequence[int]`): Token ids.

    Returns:
        `list[str]`: one text per id.
    """
    ids = list(map(int, ids))
    pieces = {id_: _piece(tokenizer, id_) for id_ in dict.fromkeys(ids)}
    known = [id_ for id_, piece in pieces.items() if piece is not None]
    decoded = tokenizer.batch_decode([[id_] for id_ in known], clean_up_tokenization_spaces=False) if known else []
    texts = {id_: _text(tokenizer, id_, pieces[id_], text) for id_, text in zip(known, decoded, strict=True)}
    return [texts.get(id_, f"<id {id_}>") for id_ in ids]


def _piece(tokenizer, id_):
    """The entry of the vocabulary for an id; `None` if there is none."""
    try:
        (piece,) = tokenizer.convert_ids_to_tokens([id_])
    except (IndexError, KeyError, OverflowError):
        return None
    # The answer of some tokenizers for any id.
    is_filler = piece is not None and piece == getattr(tokenizer, "unk_token", None) and id_ != tokenizer.unk_token_id
    return None if is_filler else piece


def _text(tokenizer, id_, piece, text):
    if isinstance(piece, bytes):
        return piece.decode("utf-8", "backslashreplace")
    if byte := _BYTE_PIECE.fullmatch(piece):
        return _byte_text(tokenizer, id_, int(byte[1], 16))
    if "\ufffd" in text:
        return _bytes_text(piece, text) or f"<id {id_}>"
    spaces = len(piece) - len(piece.lstrip("▁"))
    return " " * spaces + text.lstrip(" ") if spaces else text or piece


def _byte_text(tokenizer, id_, byte):
    """A byte token: as its character if there is no other token for it, such as the line break of Llama 2."""
    character = chr(byte)
    piece = "▁" if character == " " else character
    shown = character in "\n\r\t" or 0x20 <= byte < 0x7F
    if not shown or tokenizer.convert_tokens_to_ids(piece) not in (None, tokenizer.unk_token_id, id_):
        return f"\\x{byte:02x}"
    return character


def _bytes_text(piece, text):
    """A piece of a byte-level vocabulary, in which every byte has its own character."""
    if all(character in _BYTES for character in piece):
        return bytes(_BYTES[character] for character in piece).decode("utf-8", "backslashreplace")
    # The character itself, which decoders also write for invalid bytes.
    return text if "\ufffd" in piece else None


def _byte_characters() -> dict[str, int]:
    """Character -> byte in the encoding of GPT-2: printable bytes are themselves, and the others start at 256."""
    shown = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [byte for byte in range(256) if byte not in set(shown)]
    return {chr(byte): byte for byte in shown} | {chr(256 + number): byte for number, byte in enumerate(hidden)}


_BYTES = _byte_characters()
