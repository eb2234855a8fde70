"""Labels that tell tokens apart."""

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from hf_transcoders.data.token_texts import token_texts


def byte_level():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|end|>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the theory of the words", "東東東東京"], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")


def byte_fallback(*pieces):
    """As SentencePiece models have it: pieces, and one for each byte of what has none."""
    vocabulary = ["<unk>", "<s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    tokenizer = Tokenizer(
        models.BPE({piece: i for i, piece in enumerate(vocabulary)}, [], unk_token="<unk>", byte_fallback=True)
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>")


def test_parts_of_a_character_are_shown_by_their_bytes():
    tokenizer = byte_level()
    ids = tokenizer("the 語 the")["input_ids"]
    texts = token_texts(tokenizer, ids)
    assert "\\xe8" in texts and "the" in texts and " the" in texts
    assert "\ufffd" not in "".join(token_texts(tokenizer, range(len(tokenizer))))
    bytes_of = [bytes([int(text[2:], 16)]) if text.startswith("\\x") else text.encode() for text in texts]
    assert b"".join(bytes_of).decode() == "the 語 the"


@pytest.mark.parametrize("make", [byte_level, lambda: byte_fallback("▁", "▁a", "a", "\n", "A", "▁▁", "\ufffd")])
def test_every_id_has_a_label_of_its_own(make):
    tokenizer = make()
    ids = range(len(tokenizer) + 50)
    texts = token_texts(tokenizer, ids)
    assert len(set(texts)) == len(ids)
    assert texts[len(tokenizer) + 7] == f"<id {len(tokenizer) + 7}>"
    assert "" not in texts


def test_byte_pieces_of_sentencepiece():
    tokenizer = byte_fallback("▁", "▁a", "a", "A")
    ids = tokenizer.convert_tokens_to_ids(["<0xE6>", "<0x0A>", "<0x41>", "<0x20>", "<0x42>", "▁", "▁a", "a", "<s>"])
    # The line break and the letter B have no other token.
    assert token_texts(tokenizer, ids) == ["\\xe6", "\n", "\\x41", "\\x20", "B", " ", " a", "a", "<s>"]


def test_the_replacement_character_itself():
    tokenizer = byte_fallback("\ufffd")
    assert token_texts(tokenizer, tokenizer.convert_tokens_to_ids(["\ufffd"])) == ["\ufffd"]


def test_a_token_in_bytes():
    """As the tokenizers of some repositories with code of their own have it."""

    class Bytes:
        def convert_ids_to_tokens(self, ids):
            return [(b" a", b"\xe6\x9d", None)[id_] for id_ in ids]

        def batch_decode(self, rows, **kwargs):
            return ["?" for _ in rows]

    assert token_texts(Bytes(), [0, 1, 2, 1]) == [" a", "\\xe6\\x9d", "<id 2>", "\\xe6\\x9d"]
