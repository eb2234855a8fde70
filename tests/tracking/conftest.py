"""A tiny run to track: a random language model, a tokenizer with a hostile token, and a trainer that logs every step."""

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from hf_transcoders import TranscoderConfig, TranscoderModel, TranscoderTrainer, TranscoderTrainingArguments
from tests.data.test_harvest import token_rows
from tests.tiny_models import VOCAB_SIZE, tiny_model


READ, WRITE = "layers.1.mlp.in", "layers.1.mlp.branch"
NAME = "layers.1.mlp.transcoder"
EVIL = "<script>document.title='owned'</script>"
EVIL_ID = 7


@pytest.fixture(scope="session")
def base():
    return tiny_model("llama")


@pytest.fixture(scope="session")
def tokenizer():
    words = {EVIL if i == EVIL_ID else f"w{i} ": i for i in range(VOCAB_SIZE)}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(words, unk_token="w0 ")))


@pytest.fixture
def make_trainer(base, tokenizer, tmp_path):
    """A function that makes a trainer into `tmp_path / "run"`; keywords go to the arguments."""

    def make(callbacks=None, model=None, output_dir=None, eval_rows=None, **changes):
        changes = {
            "max_steps": 12,
            "per_device_train_batch_size": 32,
            "harvest_batch_size": 8,
            "buffer_tokens": 128,
            "learning_rate": 3e-3,
            "logging_steps": 1,
            "save_strategy": "no",
            "eval_strategy": "steps",
            "eval_steps": 6,
            "eval_tokens": 80,
            "eval_loss_tokens": 40,
            "use_cpu": True,
            "disable_tqdm": True,
            "report_to": "hf_transcoders",
            **changes,
        }
        if model is None:
            torch.manual_seed(0)
            model = TranscoderModel(TranscoderConfig.for_model(base, READ, WRITE, num_features=64, k=4))
        # Every eighth token of the held-out rows is the hostile one, so that it is in the contexts.
        held_out = token_rows(16, seed=1) if eval_rows is None else eval_rows
        for row in held_out:
            row["input_ids"][4] = EVIL_ID
        return TranscoderTrainer(
            model=model,
            base_model=base,
            args=TranscoderTrainingArguments(str(output_dir or tmp_path / "run"), **changes),
            train_dataset=token_rows(64),
            eval_dataset=held_out,
            processing_class=tokenizer,
            callbacks=callbacks,
        )

    return make
