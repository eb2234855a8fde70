# /// script
# dependencies = ["hf_transcoders[gguf]"]
# ///
"""
Train transcoders and an SAE of one layer on the same forward passes, compare them, and explain features.

    python examples/scripts/train_and_compare.py                                    # SmolLM2, from a package
    python examples/scripts/train_and_compare.py --model openai-community/gpt2 --layer 8 --data my_text.txt
"""

import argparse

import torch

from hf_transcoders import (
    TranscoderConfig,
    TranscoderModel,
    TranscoderSet,
    TranscoderTrainer,
    TranscoderTrainingArguments,
    explain_features,
    load_language_model,
    load_texts,
    pack_tokens,
)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct", help="Hub id, folder, or name of a packaged model")
    parser.add_argument("--layer", type=int, default=8)
    parser.add_argument("--data", default="docstrings", help="Hub dataset, file, folder or docstrings")
    parser.add_argument("--documents", type=int, default=1500)
    parser.add_argument("--max-tokens", type=int, default=300_000)
    parser.add_argument("--output-dir", default="runs/compare")
    args = parser.parse_args()

    base, tokenizer = load_language_model(args.model)
    texts = load_texts(args.data, limit=args.documents).train_test_split(test_size=0.1, seed=0)
    train, test = pack_tokens(texts["train"], tokenizer), pack_tokens(texts["test"], tokenizer)

    read, write = f"layers.{args.layer}.mlp.in", f"layers.{args.layer}.mlp.branch"
    size = {"num_features": 4 * base.config.hidden_size, "k": 32}
    torch.manual_seed(0)
    models = TranscoderSet(
        {
            "transcoder": TranscoderModel(TranscoderConfig.for_model(base, read, write, **size)),
            "skip": TranscoderModel(TranscoderConfig.for_model(base, read, write, skip_connection=True, **size)),
            "sae": TranscoderModel(TranscoderConfig.for_model(base, write, **size)),
        }
    )
    trainer = TranscoderTrainer(
        models,
        base,
        TranscoderTrainingArguments(args.output_dir, max_tokens=args.max_tokens, save_strategy="no"),
        train_dataset=train,
        eval_dataset=test,
        processing_class=tokenizer,
    )
    trainer.train()
    trainer.save_model()
    print(trainer.evaluation_report())
    for explanation in explain_features(
        base, models["transcoder"], test, tokenizer, num_features=3, max_tokens=10_000
    ):
        print(explanation, end="\n\n")


if __name__ == "__main__":
    main()
