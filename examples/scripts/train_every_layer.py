# /// script
# dependencies = ["hf_transcoders[gguf]"]
# ///
"""
Train a transcoder for the MLP of every layer on the same forward passes of the language model, and evaluate the model with
each of them and with all of them spliced in.

    python examples/scripts/train_every_layer.py                                    # SmolLM2, from a package
    python examples/scripts/train_every_layer.py --model openai-community/gpt2 --data my_text.txt --num-features 6144
"""

import argparse
from pathlib import Path

import torch

from hf_transcoders import (
    TranscoderConfig,
    TranscoderEvaluator,
    TranscoderModel,
    TranscoderSet,
    TranscoderTrackingCallback,
    TranscoderTrainer,
    TranscoderTrainingArguments,
    load_language_model,
    load_texts,
    pack_tokens,
)
from hf_transcoders.hub import card_of_folder
from hf_transcoders.lm import num_layers


def main():
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct", help="Hub id, folder, or name of a packaged model")
    parser.add_argument("--data", default="docstrings", help="what `load_texts` takes")
    parser.add_argument("--split", default="train")
    parser.add_argument("--eval-split", help="left out, a tenth of the texts is held out")
    parser.add_argument("--documents", type=int, help="number of texts to read")
    # Without a GPU: what two cores train in some twenty minutes.
    parser.add_argument("--num-features", type=int, help="by default 4 times the hidden size, 16 times on a GPU")
    parser.add_argument("--k", type=int, default=64 if on_gpu else 32)
    parser.add_argument("--max-tokens", type=int, default=10_000_000 if on_gpu else 300_000)
    parser.add_argument("--batch-tokens", type=int, default=4096 if on_gpu else 1024, help="tokens of a step")
    parser.add_argument("--learning-rate", type=float, default=1e-3 if on_gpu else 2e-3)
    parser.add_argument("--save-steps", type=float, default=0.1, help="steps between checkpoints, or their share")
    parser.add_argument("--eval-tokens", type=int, default=16_000)
    parser.add_argument("--eval-loss-tokens", type=int, default=4_000, help="each takes about 50 forward passes")
    parser.add_argument("--output-dir", default="runs/every_layer")
    args = parser.parse_args()

    base, tokenizer = load_language_model(args.model)
    texts = load_texts(args.data, split=args.split, limit=args.documents)
    if args.eval_split:
        held_out = load_texts(args.data, split=args.eval_split)
    else:
        texts, held_out = texts.train_test_split(test_size=0.1, seed=0).values()
    train, test = pack_tokens(texts, tokenizer), pack_tokens(held_out, tokenizer)

    size = {"num_features": args.num_features or (16 if on_gpu else 4) * base.config.hidden_size, "k": args.k}
    torch.manual_seed(0)
    models = TranscoderSet(
        TranscoderModel(
            TranscoderConfig.for_model(base, f"layers.{layer}.mlp.in", f"layers.{layer}.mlp.branch", **size)
        )
        for layer in range(num_layers(base))
    )
    trainer = TranscoderTrainer(
        models,
        base,
        TranscoderTrainingArguments(
            args.output_dir,
            max_tokens=args.max_tokens,
            per_device_train_batch_size=args.batch_tokens,
            learning_rate=args.learning_rate,
            # Two vectors of every layer are held for each token, 140 kB in SmolLM2: few at a time, none for later.
            buffer_tokens=16384,
            initialization_tokens=8192,
            activation_cache_gb=0,
            save_steps=args.save_steps,
            save_total_limit=1,
        ),
        train_dataset=train,
        eval_dataset=test,
        processing_class=tokenizer,
        # Features of 30 dictionaries are more than the records of a run need; `hf-transcoders features` looks them up.
        callbacks=[TranscoderTrackingCallback(feature_tokens=0)],
    )
    trainer.train()
    trainer.save_model()

    evaluator = TranscoderEvaluator(
        base,
        test,
        max_tokens=args.eval_tokens,
        max_loss_tokens=args.eval_loss_tokens,
        special_token_ids=tokenizer.all_special_ids,
    )
    report = evaluator.evaluate(models, together=True)
    report.save_into(args.output_dir)
    report.save_json(Path(args.output_dir, "evaluation.json"))
    card_of_folder(args.output_dir, report=report).save(args.output_dir)
    print(report)


if __name__ == "__main__":
    main()
