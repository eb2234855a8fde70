"""The special tokens at the beginning of a text stand there once."""

import pytest
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from hf_transcoders.data import pack_tokens
from hf_transcoders.data.special_tokens import encode_text, with_beginning
from hf_transcoders.tasks import Task
from hf_transcoders.tasks.prompt_encoding import PromptEncoder


WORDS = "what is the capital of peru lima".split()
TEMPLATE = "{{ prefix }}{% for message in messages %}{{ message.content }}{% endfor %}"


def make_tokenizer(single="<s> $A", beginning="<s>"):
    specials = ["<pad>", "<s>", "</s>", "<unk>", "[gMASK]"]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate([*specials, *WORDS])}, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    used = [(token, specials.index(token)) for token in single.split() if token in specials]
    tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=used)
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>",
        additional_special_tokens=["[gMASK]"],
    )  # fmt: skip
    made.chat_template = TEMPLATE.replace("prefix", repr(beginning))
    return made


@pytest.mark.parametrize(
    ("single", "beginning"),
    [("<s> $A", "<s>"), ("<s> $A </s>", "<s>"), ("[gMASK] <s> $A", "[gMASK]<s>"), ("$A", "<s>"), ("$A", "")],
)
def test_a_chat_gets_the_tokens_of_its_template(single, beginning):
    tokenizer = make_tokenizer(single, beginning)
    chat = [{"role": "user", "content": "what is the capital of peru"}]
    text = tokenizer.apply_chat_template(chat, tokenize=False)
    assert encode_text(tokenizer, text) == tokenizer.apply_chat_template(chat, tokenize=True)["input_ids"]
    # Any other text is as the tokenizer has it, repeated words included.
    for other in ("what is the capital", "the the capital", "the capital the capital", "", "the"):
        assert encode_text(tokenizer, other) == tokenizer(other)["input_ids"]


def test_prompts_of_tasks_and_their_positions():
    tokenizer = make_tokenizer()
    plain, chat = "what is the capital of peru", "<s>what is the capital of peru"
    encoder = PromptEncoder(tokenizer)
    first, second = encoder.encode([plain, chat])
    assert first == second == tokenizer(plain)["input_ids"]
    tasks = [
        Task.from_pairs(tokenizer, [text], [text.replace("peru", "lima")], [" lima"], positions={"PLACE": ["peru"]})
        for text in (plain, chat)
    ]
    assert tasks[0][0]["positions"] == tasks[1][0]["positions"] == {"PLACE": 6, "END": 6}
    assert (
        tasks[0][0]["clean_ids"] == tasks[1][0]["clean_ids"] and tasks[0][0]["answer_ids"] == tasks[1][0]["answer_ids"]
    )
    assert (
        with_beginning([1, 5], [1]) == [1, 5] and with_beginning([5], [1]) == [1, 5] and with_beginning([5], []) == [5]
    )


def test_a_packed_row_begins_with_one_beginning():
    tokenizer = make_tokenizer()
    texts = Dataset.from_dict({"text": ["<s>what is the capital", "of peru", "<s>lima"] * 6})
    for dataset in (texts, texts.map(lambda row: tokenizer(row["text"], add_special_tokens=False))):
        rows = pack_tokens(dataset, tokenizer, 6)["input_ids"]
        assert all(row[0] == 1 and row[1] != 1 and len(row) == 6 for row in rows)
        # Nothing is lost on the way: without the beginnings of rows, these are the documents.
        stream = [
            id_ for text in texts["text"] for id_ in [*tokenizer(text, add_special_tokens=False)["input_ids"], 2]
        ]
        spelled, place = [], 0
        for row in rows:
            own = row if stream[place] == 1 else row[1:]
            spelled, place = spelled + own, place + len(own)
        assert spelled == stream[: len(spelled)] and len(stream) - len(spelled) < 6
