"""Planted features: text of a small vocabulary, and activations that follow a rule exactly."""

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from hf_transcoders.features.examples import ExampleText, FeatureExamples
from hf_transcoders.features.running_examples import ExampleSizes, RunningExamples
from hf_transcoders.features.text_sample import sample_text

from ...evaluation.conftest import random_dictionary
from ..conftest import base


__all__ = ["base"]

END, LENGTH, WINDOW = 0, 16, 8
#: Features of the planted dictionary.
TOKEN, SHUFFLED, PAIR, CAPITAL, INSIDE, RARE, SILENT = range(7)
_WORDS = [f" w{i}" for i in range(40)] + [f" W{i}" for i in range(6)] + [' "', " ("]
VOCABULARY = ["<end>", *_WORDS]


@pytest.fixture(scope="session")
def tokenizer():
    words = {word: i for i, word in enumerate(VOCABULARY)}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(words, unk_token="<end>")), eos_token="<end>")


def planted_text(documents=160, seed=0):
    """Documents of random words, packed into rows that run across them."""
    generator = torch.Generator().manual_seed(seed)
    tokens = []
    for _ in range(documents):
        length = int(torch.randint(20, 45, (1,), generator=generator))
        words = torch.randint(1, len(VOCABULARY), (length,), generator=generator)
        # Half of the words are frequent ones, whose pairs are seen often.
        frequent = torch.randint(1, 9, (length,), generator=generator)
        tokens += words.where(torch.rand(length, generator=generator) < 0.5, frequent).tolist() + [END]
    rows = len(tokens) // LENGTH
    return torch.tensor(tokens[: rows * LENGTH]).view(rows, LENGTH)


def planted_activations(ids, seed=0):
    """Activations `(rows, seq, 7)`: a table of tokens, the same shuffled, a pair of tokens, capitals, one after quotation marks,
    one that fires in few documents, and one that never fires."""
    generator = torch.Generator().manual_seed(seed)
    found = torch.zeros(*ids.shape, 7)
    table = torch.zeros(len(VOCABULARY))
    table[[3, 7, 11]] = torch.tensor([3.0, 1.0, 2.0])
    found[..., TOKEN] = table[ids]
    flat = found[..., TOKEN].flatten()
    found[..., SHUFFLED] = flat[torch.randperm(len(flat), generator=generator)].view(ids.shape)
    before = ids.roll(1, 1)
    before[:, 0] = END
    found[..., PAIR] = ((ids <= 4) & (ids > 0) & (before > 4) & (before <= 8)) * 2.0
    capital = torch.tensor([" W" in word for word in VOCABULARY])
    found[..., CAPITAL] = capital[ids] * 1.5
    quote = torch.tensor([word == ' "' for word in VOCABULARY])
    found[..., INSIDE] = quote[before] * 1.0
    found[:6, :, RARE] = table[ids[:6]]
    return found


def planted_examples(base, seed=0):
    ids = planted_text(seed=seed)
    sample = sample_text([{"input_ids": row.tolist()} for row in ids], max_tokens=10**6, separator=END)
    activations = planted_activations(ids, seed)
    sizes = ExampleSizes(window=WINDOW, sketch=0)
    running = RunningExamples(range(7), random_dictionary(base, 0, "relu"), sample, sizes)
    for rows in torch.arange(len(ids)).split(8):
        running.update(activations[rows], rows, torch.ones(len(rows), LENGTH, dtype=torch.bool))
    return FeatureExamples.of(running, ExampleText.of(sample))


@pytest.fixture
def examples(base):
    return planted_examples(base)
