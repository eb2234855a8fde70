# /// script
# dependencies = ["hf_transcoders[gguf]"]
# ///
"""
Push dictionaries to the Hub with their card, load them back in a fresh cache, and compare bit for bit.

    python examples/scripts/push_and_load.py --repo me/my-transcoder --folder runs/l8   # your own dictionaries
    python examples/scripts/push_and_load.py                                            # trains a small one first

Without a token, or if the Hub cannot be reached, everything goes to a local server that speaks the Hub's
protocol, and the script says so.
"""

import argparse
import contextlib
import tempfile
from pathlib import Path

import torch
from huggingface_hub import HfApi, get_token

from hf_transcoders import (
    TranscoderConfig,
    TranscoderModel,
    TranscoderSet,
    TranscoderTrainer,
    TranscoderTrainingArguments,
    load_language_model,
    load_texts,
)
from hf_transcoders.testing import local_hub


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repo", default="my-transcoder", help="where to push; your own namespace if it names none")
    parser.add_argument("--folder", help="trained dictionaries; left out, a small one is trained")
    parser.add_argument("--output-dir", default="runs/push_and_load", help="folder of that training run")
    parser.add_argument("--max-tokens", type=int, default=20_000)
    args = parser.parse_args()

    with the_hub() as endpoint:
        if args.folder:
            kind = TranscoderSet if Path(args.folder, "transcoder_set.json").exists() else TranscoderModel
            dictionaries = kind.from_pretrained(args.folder)
            commit = dictionaries.push_to_hub(args.repo)
        else:
            trainer = train(args.output_dir, args.max_tokens)
            dictionaries = trainer.model.eval()
            commit = trainer.push_to_hub(args.repo, private=True)
        print(f"Pushed: {commit.commit_url}")
        repo_id = commit.repo_url.repo_id
        for path in HfApi().list_repo_files(repo_id):
            print(f"  {path}")

        # With an empty cache, everything must be downloaded.
        with tempfile.TemporaryDirectory() as cache:
            loaded = type(dictionaries).from_pretrained(repo_id, cache_dir=cache)
        ours, theirs = named(dictionaries), named(loaded)
        for name, dictionary in ours.items():
            inputs = torch.randn(64, dictionary.config.d_in)
            same = torch.equal(dictionary(inputs).reconstruction, theirs[name](inputs).reconstruction)
            print(f"{name}: {'equal bit for bit' if same else 'DIFFERENT'}")
            if not same:
                raise SystemExit(1)
        print(f"Loaded back from {repo_id} at {endpoint}.")


@contextlib.contextmanager
def the_hub():
    """The Hub, if it accepts this machine's token; otherwise a local server."""
    api = HfApi()
    reason = "You are not logged in to the Hub"
    if get_token():
        try:
            user = api.whoami()["name"]
        except Exception as error:
            reason = f"The Hub at {api.endpoint} does not answer ({type(error).__name__})"
        else:
            print(f"Pushing to {api.endpoint} as {user}.")
            yield api.endpoint
            return
    with local_hub() as hub:
        print(f"{reason}: pushing to a local server at {hub.url}, where nothing stays when this script ends.")
        yield hub.url


def train(output_dir, max_tokens):
    base, tokenizer = load_language_model()
    texts = load_texts("docstrings", limit=400).train_test_split(test_size=0.2, seed=0)
    torch.manual_seed(0)
    config = TranscoderConfig.for_model(base, "layers.8.mlp.in", "layers.8.mlp.branch", num_features=1152, k=32)
    trainer = TranscoderTrainer(
        TranscoderModel(config),
        base,
        TranscoderTrainingArguments(
            output_dir,
            max_tokens=max_tokens,
            buffer_tokens=8192,
            initialization_tokens=4096,
            per_device_train_batch_size=1024,
            save_strategy="no",
            eval_tokens=2000,
            eval_loss_tokens=500,
        ),  # fmt: skip
        train_dataset=texts["train"],
        eval_dataset=texts["test"],
        processing_class=tokenizer,
    )
    trainer.train()
    return trainer


def named(dictionaries):
    return dict(dictionaries.items()) if isinstance(dictionaries, TranscoderSet) else {"dictionary": dictionaries}


if __name__ == "__main__":
    main()
