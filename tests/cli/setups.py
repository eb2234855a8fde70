"""A tiny language model with texts, and command lines that train on them."""

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.tiny_models import VOCAB_SIZE, tiny_model


WORDS = ["the", "cat", "dog", "sat", "ran", "on", "under", "a", "mat", "tree", "house", "and", "then", "slept"]


def fill_workplace(folder):
    """A tiny language model and two texts, as files in a folder."""
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3} | {word: i + 4 for i, word in enumerate(WORDS)}
    vocabulary |= {f"w{i}": i for i in range(len(vocabulary), VOCAB_SIZE)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    ).save_pretrained(folder / "model")
    tiny_model("llama").save_pretrained(folder / "model")
    generator = torch.Generator().manual_seed(0)
    for name, documents in (("train", 60), ("test", 20)):
        texts = [
            " ".join(WORDS[i] for i in torch.randint(len(WORDS), (40,), generator=generator)) for _ in range(documents)
        ]
        (folder / f"{name}.txt").write_text("\n\n".join(texts))
    return folder


def train_arguments(workplace, output, *more):
    return [
        "train", "--model", str(workplace / "model"), "--data", str(workplace / "train.txt"), "--layers", "1",
        "--num_features", "64", "--k", "4", "--output_dir", str(output), "--max_tokens", "640",
        "--per_device_train_batch_size", "32", "--sequence_length", "16", "--use_cpu", "--dtype", "float32",
        "--eval_tokens", "200", "--eval_loss_tokens", "100", "--report_to", "none", *more,
    ]  # fmt: skip
