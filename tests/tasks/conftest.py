"""Tokenizers of several kinds, built from the words of the tasks, and the expected text of their tokens."""

import re
from importlib import import_module

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizer, PreTrainedTokenizerFast

from hf_transcoders import offline_model
from hf_transcoders.tasks import ioi, words


# The package exports functions with the names of these modules.
agreement, colors, docstrings, pronouns, years = (
    import_module(f"hf_transcoders.tasks.{name}")
    for name in (
        "subject_verb_agreement",
        "colored_objects",
        "docstring_completion",
        "gendered_pronoun",
        "greater_than",
    )
)


def _vocabulary():
    """All words and punctuation marks of the prompts, without digits."""
    texts = [*ioi.TEMPLATES, *pronouns._TEMPLATES, *agreement._TEMPLATES.values()]
    texts += [colors._SHOT, colors._LIST, docstrings._TEMPLATE, years._TEMPLATE, *colors._OPENINGS]
    found = {word for text in texts for word in re.findall(r"[A-Za-z]+|[^\sA-Za-z{}\d]+", re.sub(r"{\w+}", " ", text))}
    found |= {*words.NAMES, *ioi._PLACES, *ioi._OBJECTS, *colors._OBJECTS, *colors._COLORS, *colors._SURFACES}
    found |= {color.title() for color in colors._COLORS} | {*years._NOUNS, *docstrings._WORDS, *docstrings._NOUNS}
    found |= {noun + ending for noun in agreement._NOUNS for ending in ("", "s")} | {
        "a",
        "an",
        "he",
        "she",
        "isn",
        "t",
    }
    found |= {verb for pair in agreement._VERBS + agreement._INNER_VERBS for verb in pair}
    return sorted(found)


def byte_level_bpe():
    """Like GPT-2's: spaces belong to words, a year is a century and two digits, and there is no beginning-of-sequence token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=6000,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|end|>"],
        show_progress=False,
    )
    # Centuries are frequent, so that they merge before the digits after them.
    centuries = [f" {century}" for century in years._CENTURIES] * 500
    pairs = [f"{number:02d}" for number in range(100)] * 5
    tokenizer.train_from_iterator([f" {word}" for word in _vocabulary() * 3] + centuries + pairs, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")


def unigram_with_bos():
    """Like Gemma's: a mark for the space, single digits, and a beginning-of-sequence token before every text."""
    pieces = ["<unk>", "<s>", "</s>"]
    pieces += [f"▁{word}" for word in _vocabulary() if word.isalpha()]
    pieces += ["▁", "\n", *sorted({letter for word in _vocabulary() for letter in word}), *"0123456789"]
    scores = [(piece, 0.0 if n < 3 else -1.0 if len(piece) > 1 else -10.0) for n, piece in enumerate(pieces)]
    tokenizer = Tokenizer(models.Unigram(list(dict(scores).items()), unk_id=0))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.Metaspace(prepend_scheme="never")]
    )
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="never")
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def word_level():
    """Whole words and punctuation marks, without digits."""
    tokenizer = Tokenizer(
        models.WordLevel({word: n for n, word in enumerate(["<unk>", "<s>", *_vocabulary()])}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", unk_token="<unk>")


class PlainWords(PreTrainedTokenizer):
    """A tokenizer without offsets: words with the space before them, marks, and single digits."""

    def __init__(self, **kwargs):
        pieces = ["<unk>", "\n", " ", *"0123456789"]
        pieces += [space + word for word in _vocabulary() for space in ("", " ")]
        pieces += [chr(code) for code in range(33, 127)]
        self.ids = {piece: n for n, piece in enumerate(dict.fromkeys(pieces))}
        super().__init__(unk_token="<unk>", **kwargs)

    @property
    def vocab_size(self):
        return len(self.ids)

    def get_vocab(self):
        return dict(self.ids)

    def _tokenize(self, text, **kwargs):
        return re.findall(r" ?[A-Za-z]+|\d|.|\n", text)

    def _convert_token_to_id(self, token):
        return self.ids.get(token, 0)

    def _convert_id_to_token(self, index):
        return list(self.ids)[index]

    def convert_tokens_to_string(self, tokens):
        return "".join(tokens)


BUILDERS = {
    "byte_level_bpe": byte_level_bpe,
    "unigram_with_bos": unigram_with_bos,
    "plain_words": PlainWords,
    "word_level": word_level,
}


@pytest.fixture(scope="session")
def tokenizers():
    """Name -> tokenizer, each built once."""
    built = {}

    def get(name):
        if name not in built:
            if name == "smollm2":
                built[name] = AutoTokenizer.from_pretrained(offline_model("smollm2-135m-instruct"))
            else:
                built[name] = BUILDERS[name]()
        return built[name]

    return get


SMOLLM2 = pytest.param("smollm2", marks=pytest.mark.real_model)


@pytest.fixture(params=["byte_level_bpe", "unigram_with_bos", "plain_words", SMOLLM2])
def tokenizer(request, tokenizers):
    """The kinds that can encode all tasks."""
    return tokenizers(request.param)


@pytest.fixture
def bpe(tokenizers):
    return tokenizers("byte_level_bpe")
