import logging
from itertools import chain

import datasets
import pytest
from datasets import Dataset, DatasetDict, Features, List, Value, disable_caching, enable_caching, load_dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from hf_transcoders.data import packing
from hf_transcoders.data.packing import pack_tokens
from hf_transcoders.data.text import load_texts
from hf_transcoders.errors import TranscoderError


WORDS = "the cat sat on a mat while two dogs ran past it".split()


def make_tokenizer(adds_bos=False, eos="<eos>", bos="<bos>", **kwargs):
    vocabulary = {word: index for index, word in enumerate(["<unk>", "<bos>", "<eos>", *WORDS])}
    backend = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = Whitespace()
    if adds_bos:
        backend.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="<unk>",
        bos_token=bos,
        eos_token=eos,
        clean_up_tokenization_spaces=False,
        **kwargs,
    )


def make_documents(count=40):
    return [" ".join(WORDS[(3 * i + j) % len(WORDS)] for j in range(1 + 5 * i % 17)) for i in range(count)]


def stream_of(documents, separator):
    """What the rows must spell, without the code under test: word ids and separators by hand."""
    ids = {word: index for index, word in enumerate(["<unk>", "<bos>", "<eos>", *WORDS])}
    return list(chain.from_iterable([*(ids[word] for word in text.split()), *separator] for text in documents))


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.mark.parametrize("sequence_length", [1, 7, 64])
def test_rows_spell_the_documents_with_separators(sequence_length):
    documents = make_documents()
    rows = pack_tokens(Dataset.from_dict({"text": documents}), make_tokenizer(), sequence_length)
    stream = stream_of(documents, [2])
    whole = len(stream) // sequence_length * sequence_length
    assert list(chain.from_iterable(rows["input_ids"])) == stream[:whole]
    assert rows.features == Features({"input_ids": List(Value("int32"), length=sequence_length)})


def test_each_batch_of_documents_loses_only_its_own_tail(monkeypatch):
    monkeypatch.setattr(packing, "_BATCH_SIZE", 10)
    documents = make_documents()
    rows = pack_tokens(Dataset.from_dict({"text": documents}), make_tokenizer(), 8)
    expected = []
    for start in range(0, 40, 10):
        stream = stream_of(documents[start : start + 10], [2])
        expected += stream[: len(stream) // 8 * 8]
    assert list(chain.from_iterable(rows["input_ids"])) == expected


def test_separator_can_be_chosen_or_left_out():
    documents = make_documents()
    texts = Dataset.from_dict({"text": documents})
    for separator, ids in [("", []), ("the cat", [3, 4])]:
        rows = pack_tokens(texts, make_tokenizer(), 5, separator=separator)
        stream = stream_of(documents, ids)
        assert list(chain.from_iterable(rows["input_ids"])) == stream[: len(stream) // 5 * 5]
    rows = pack_tokens(texts, make_tokenizer(eos=None), 5)
    assert 2 not in set(chain.from_iterable(rows["input_ids"]))


def test_bos_begins_every_row_and_appears_nowhere_else():
    documents = make_documents()
    texts = Dataset.from_dict({"text": documents})
    stream = stream_of(documents, [2])
    rows = pack_tokens(texts, make_tokenizer(adds_bos=True), 6)["input_ids"]
    assert {row[0] for row in rows} == {1}
    assert list(chain.from_iterable(row[1:] for row in rows)) == stream[: len(stream) // 5 * 5]
    # The tokenizer decides only when it is not told.
    assert pack_tokens(texts, make_tokenizer(), 6, add_bos=True)["input_ids"][:] == rows[:]
    assert 1 not in chain.from_iterable(
        pack_tokens(texts, make_tokenizer(adds_bos=True), 6, add_bos=False)["input_ids"]
    )
    assert 1 not in chain.from_iterable(pack_tokens(texts, make_tokenizer(), 6)["input_ids"])


def test_streaming_and_processes_give_the_same_rows(monkeypatch):
    monkeypatch.setattr(packing, "_BATCH_SIZE", 16)
    texts = Dataset.from_dict({"text": make_documents()})
    rows = pack_tokens(texts, make_tokenizer(adds_bos=True), 6)["input_ids"][:]
    streamed = pack_tokens(texts.to_iterable_dataset(num_shards=1), make_tokenizer(adds_bos=True), 6)
    assert [row["input_ids"] for row in streamed] == rows
    assert pack_tokens(texts, make_tokenizer(adds_bos=True), 6, num_proc=2)["input_ids"][:] == rows


def test_stream_resumes_where_it_stopped():
    texts = Dataset.from_dict({"text": make_documents()}).to_iterable_dataset()
    packed = pack_tokens(texts, make_tokenizer(), 6)
    rows = [row["input_ids"] for row in packed]
    iterator = iter(packed)
    first = [next(iterator)["input_ids"] for _ in range(5)]
    state = packed.state_dict()
    packed.load_state_dict(state)
    assert first + [row["input_ids"] for row in packed] == rows


def test_empty_and_missing_documents_leave_no_trace():
    documents = make_documents(10)
    texts = Dataset.from_dict({"text": [documents[0], "", None, " ", *documents[1:]]})
    assert (
        pack_tokens(texts, make_tokenizer(), 4)["input_ids"][:]
        == pack_tokens(Dataset.from_dict({"text": documents}), make_tokenizer(), 4)["input_ids"][:]
    )


def test_tokenized_documents_are_joined_and_packed_rows_left_alone():
    documents = make_documents()
    tokenizer = make_tokenizer()
    rows = pack_tokens(Dataset.from_dict({"text": documents}), tokenizer, 6)
    ids = tokenizer(documents, add_special_tokens=False)["input_ids"]
    tokenized = Dataset.from_dict({"input_ids": ids, "attention_mask": [[1] * len(row) for row in ids]})
    again = pack_tokens(tokenized.with_format("torch"), tokenizer, 6)
    assert again.column_names == ["input_ids"]
    assert again["input_ids"][:] == rows["input_ids"][:]
    assert pack_tokens(rows, tokenizer, 6)["input_ids"][:] == rows["input_ids"][:]
    with pytest.raises(TranscoderError, match="packed in rows of 6 tokens, not 8"):
        pack_tokens(rows, tokenizer, 8)


def test_second_call_reads_the_cache_and_works_without_one(tmp_path):
    file = tmp_path / "texts.parquet"
    Dataset.from_dict({"text": make_documents()}).to_parquet(file)
    texts = load_dataset("parquet", data_files=str(file), split="train")
    first = pack_tokens(texts, make_tokenizer(), 6)
    tokenizer = make_tokenizer()
    tokenizer(["the cat", "a"], padding=False, truncation=True, max_length=1)  # a used tokenizer is the same tokenizer
    second = pack_tokens(texts, tokenizer, 6)
    assert second.cache_files == first.cache_files and second._fingerprint == first._fingerprint
    assert pack_tokens(texts, make_tokenizer(), 7).cache_files != first.cache_files
    assert pack_tokens(texts, make_tokenizer(adds_bos=True), 6).cache_files != first.cache_files
    disable_caching()
    try:
        uncached = pack_tokens(texts, make_tokenizer(), 6)
    finally:
        enable_caching()
    assert uncached.cache_files != first.cache_files
    assert uncached["input_ids"][:] == first["input_ids"][:]


def test_no_warning_about_long_documents(caplog):
    documents = Dataset.from_dict({"text": [" ".join(WORDS * 50)]})
    transformers_logger = logging.getLogger("transformers")
    transformers_logger.addHandler(caplog.handler)
    try:
        rows = pack_tokens(documents, make_tokenizer(model_max_length=16), 8)
    finally:
        transformers_logger.removeHandler(caplog.handler)
    assert len(rows) == (50 * len(WORDS) + 1) // 8
    assert caplog.text == ""


@pytest.mark.parametrize("streaming", [False, True])
def test_too_little_text_is_refused_with_the_numbers(streaming):
    texts = Dataset.from_dict({"text": ["the cat sat", "on a mat"]})
    texts = texts.to_iterable_dataset() if streaming else texts
    with pytest.raises(TranscoderError, match="only 6 tokens in 2 documents, too few for one row of 128"):
        pack_tokens(texts, make_tokenizer(), 128)


def test_wrong_arguments_are_refused():
    texts = Dataset.from_dict({"text": make_documents()})
    with pytest.raises(TranscoderError, match="neither 'text' nor 'input_ids'"):
        pack_tokens(texts.rename_column("text", "content"), make_tokenizer(), 8)
    with pytest.raises(TranscoderError, match="no beginning-of-sequence token"):
        pack_tokens(texts, make_tokenizer(bos=None), 8, add_bos=True)
    with pytest.raises(TranscoderError, match="at least 2 token"):
        pack_tokens(texts, make_tokenizer(adds_bos=True), 1)
    with pytest.raises(TranscoderError, match="at least 1 token"):
        pack_tokens(texts, make_tokenizer(), 0)


@pytest.mark.parametrize("streaming", [False, True])
def test_padding_of_tokenized_documents_is_not_packed(tmp_path, streaming):
    documents = make_documents()
    tokenizer = make_tokenizer()
    expected = pack_tokens(Dataset.from_dict({"text": documents}), tokenizer, 6)["input_ids"][:]
    rows = []
    for number, text in enumerate(documents):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        spare = [0] * (number % 4)
        before, after = (spare, []) if number % 2 else ([], spare)
        mask = [0] * len(before) + [1] * len(ids) + [0] * len(after)
        # Where nothing is padded there may be no mask.
        rows.append({"input_ids": before + ids + after, "attention_mask": mask if spare else None})
    rows.append({"input_ids": [4, 4], "attention_mask": [0, 0]})
    file = tmp_path / "rows.parquet"
    Dataset.from_list(rows).to_parquet(file)
    texts = load_texts(file, streaming=streaming)
    packed = pack_tokens(texts, tokenizer, 6)
    assert [row["input_ids"] for row in packed] == expected
    assert list(next(iter(packed))) == ["input_ids"]


def test_rows_of_the_right_length_keep_their_mask():
    features = Features({"input_ids": List(Value("int32"), length=4), "attention_mask": List(Value("int8"), length=4)})
    rows = Dataset.from_dict({"input_ids": [[5, 6, 0, 0]], "attention_mask": [[1, 1, 0, 0]]}, features=features)
    packed = pack_tokens(rows, make_tokenizer(), 4)
    assert packed[0] == {"input_ids": [5, 6, 0, 0], "attention_mask": [1, 1, 0, 0]}


def test_several_splits_are_refused():
    with pytest.raises(TranscoderError, match="not one dataset but a DatasetDict of train, test: choose one"):
        pack_tokens(
            DatasetDict({name: Dataset.from_dict({"text": ["the cat"]}) for name in ("train", "test")}),
            make_tokenizer(),
        )
