"""Pack documents into rows of equal length."""

from itertools import chain

from ..errors import TranscoderError
from .rows import read_row, refuse_splits, token_rows


# Documents packed together. The tail of each batch is dropped: larger batches lose less, and smaller ones start sooner.
_BATCH_SIZE = 1000


def pack_tokens(texts, tokenizer, sequence_length=128, *, add_bos=None, separator=None, num_proc=None):
    """
    Tokenize documents, join them, and cut the stream of tokens into rows of exactly `sequence_length`.

    Every document is followed by the separator, and rows run across documents, so no padding is needed. For a model such a
    row is one text: the ends of documents are not kept, and tokens attend to those of earlier documents in the row. For
    documents that are already tokenized, padding by their `attention_mask` is removed. Documents are packed a thousand at a
    time, and the tail of each thousand that does not fill a row is dropped (fewer than `sequence_length` tokens). Nothing is
    carried over to the next thousand, so a stream can resume exactly. The rows do not depend on `num_proc` and streaming.
    Both steps are `map` calls that `datasets` caches as usual.

    Args:
        texts ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            One document per row, in the column `text`, or in the column `input_ids` if already tokenized. Empty
            documents are skipped. Rows that are already packed to `sequence_length` are returned as they are, with
            their `attention_mask` if they have one.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer of the base model.
        sequence_length (`int`, *optional*, defaults to 128):
            Number of tokens per row, including the beginning-of-sequence token.
        add_bos (`bool`, *optional*):
            Whether each row begins with the tokenizer's beginning-of-sequence token. Defaults to the tokenizer's
            behavior for a single text: yes for Gemma, no for GPT-2 and SmolLM2. A document that already begins with one,
            such as from a chat template, gets no second one.
        separator (`str`, *optional*):
            Text after every document, `""` for none. Defaults to the tokenizer's end-of-sequence token, if it has one.
        num_proc (`int`, *optional*):
            Number of processes that tokenize. Not used for a stream.

    Returns:
        [`~datasets.Dataset`] or [`~datasets.IterableDataset`], like `texts`, with one column `input_ids`: `int32` rows of
        length `sequence_length`.

    Raises:
        [`TranscoderError`]: The dataset has neither column, there is too little text for one row, the dataset is packed
            to another length, or a beginning-of-sequence token is asked for that the tokenizer does not have.
    """
    from datasets import Features, IterableDataset, List, Value

    refuse_splits(texts)
    bos = bos_token_ids(tokenizer, add_bos)
    if sequence_length <= len(bos):
        raise TranscoderError(
            f"sequence_length is {sequence_length}, but a row needs at least {len(bos) + 1} token(s): give a larger one."
        )

    streaming = isinstance(texts, IterableDataset)
    columns = texts.column_names or list(next(iter(texts), {}))
    tokenized = [name for name in ("input_ids", "attention_mask") if name in columns] if "input_ids" in columns else []
    if tokenized:
        documents = texts.select_columns(tokenized)
        packed_length = _packed_length(documents)
        if packed_length == sequence_length:
            return documents
        if packed_length is not None:
            raise TranscoderError(
                f"The dataset is already packed in rows of {packed_length} tokens, not {sequence_length}: set "
                f"sequence_length={packed_length} or pack the text again."
            )
        documents = documents.with_format(None)
    elif "text" in columns:
        documents = texts.map(
            _tokenize,
            batched=True,
            fn_kwargs={"tokenizer": tokenizer},
            remove_columns=columns,
            features=Features({"input_ids": List(Value("int32"))}),
            **({} if streaming else {"num_proc": num_proc, "desc": "Tokenizing"}),
        )
    else:
        raise TranscoderError(
            f"The dataset has the columns {columns}, but neither 'text' nor 'input_ids': load it with load_texts, or "
            "rename the column that holds the text."
        )

    packed = documents.map(
        _pack,
        batched=True,
        batch_size=_BATCH_SIZE,
        fn_kwargs={
            "bos": bos,
            "separator": _separator_ids(tokenizer, separator),
            "sequence_length": sequence_length,
        },
        features=Features({"input_ids": List(Value("int32"), length=sequence_length)}),
        remove_columns=tokenized[1:],
        **({} if streaming else {"desc": f"Packing into rows of {sequence_length} tokens"}),
    )
    if next(iter(packed), None) is None:
        lengths = [len(read_row(row)) for row in documents]
        raise TranscoderError(
            f"The text has only {sum(lengths)} tokens in {len(lengths)} documents, too few for one row of "
            f"{sequence_length}: give more text or a smaller sequence_length."
        )
    return packed


def packed_rows(dataset, tokenizer, sequence_length, tokenizer_argument="processing_class"):
    """
    Return rows with `input_ids` unchanged, and pack rows with `text`.

    Args:
        dataset (`datasets.Dataset`, `datasets.IterableDataset`, `Iterable[Mapping]` or `None`): Rows, or texts.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*): Tokenizer of the base model.
        sequence_length (`int`): Tokens per packed row.
        tokenizer_argument (`str`, *optional*, defaults to `"processing_class"`): Name of the argument that is the tokenizer,
            for the message.

    Raises:
        [`TranscoderError`]: the dataset holds texts and there is no tokenizer, or it is a dictionary of splits.
    """
    if dataset is None:
        return None
    dataset = token_rows(dataset)
    columns = getattr(dataset, "column_names", None)
    if columns is None or "input_ids" in columns or "text" not in columns:
        return dataset
    if tokenizer is None:
        raise TranscoderError(f"The dataset holds text: give the tokenizer of the model as `{tokenizer_argument}`.")
    return pack_tokens(dataset, tokenizer, sequence_length)


def _tokenize(batch, tokenizer):
    texts = [text for text in batch["text"] if text]
    if not texts:
        return {"input_ids": []}
    # A document may be longer than the model's context, because it is cut into rows later; verbose=False silences the
    # warning about it.
    encoding = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, truncation=False, verbose=False)
    return {"input_ids": [ids for ids in encoding["input_ids"] if ids]}


def _pack(batch, bos, separator, sequence_length):
    documents = batch["input_ids"]
    if "attention_mask" in batch:
        rows = zip(documents, batch["attention_mask"], strict=True)
        documents = [read_row({"input_ids": ids, "attention_mask": mask}).tolist() for ids, mask in rows]
    tokens = list(chain.from_iterable(chain(ids, separator) for ids in documents if len(ids)))
    rows, start = [], 0
    while start < len(tokens):
        beginning = [] if tokens[start : start + 1] == bos else bos
        end = start + sequence_length - len(beginning)
        if end > len(tokens):
            break
        rows.append(beginning + tokens[start:end])
        start = end
    return {"input_ids": rows}


def _packed_length(documents):
    """The declared length of all rows, or `None`."""
    from datasets import List

    feature = documents.features["input_ids"] if documents.features is not None else None
    return feature.length if isinstance(feature, List) and feature.length >= 0 else None


def bos_token_ids(tokenizer, add_bos=None):
    """The beginning-of-sequence token as a list, which is empty without one; by default as the tokenizer does for a text."""
    bos = tokenizer.bos_token_id
    if add_bos is None:
        add_bos = bos is not None and tokenizer("a")["input_ids"][:1] == [bos]
    if add_bos and bos is None:
        raise TranscoderError(
            "The tokenizer has no beginning-of-sequence token: leave out add_bos, or set tokenizer.bos_token first."
        )
    return [bos] if add_bos else []


def _separator_ids(tokenizer, separator):
    if separator is None:
        return [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    return list(tokenizer(separator, add_special_tokens=False)["input_ids"]) if separator else []
