# /// script
# dependencies = ["hf_transcoders[gguf,plots,trackio]"]
# ///
"""
Train a transcoder and an SAE with Trackio, then look at the run: curves, histograms, features.

    python examples/scripts/train_and_track.py                       # SmolLM2, from a package; a few minutes on a CPU
    python examples/scripts/train_and_track.py --model openai-community/gpt2 --data my_text.txt --report-to tensorboard

Nothing leaves this machine: Trackio keeps its runs in a local database.
"""

import argparse
from pathlib import Path

import torch

from hf_transcoders import (
    TranscoderConfig,
    TranscoderModel,
    TranscoderSet,
    TranscoderTrackingCallback,
    TranscoderTrainer,
    TranscoderTrainingArguments,
    load_language_model,
    load_texts,
    pack_tokens,
)
from hf_transcoders.tracking import Run


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct", help="Hub id, folder, or name of a packaged model")
    parser.add_argument("--layer", type=int, default=8)
    parser.add_argument("--data", default="docstrings", help="Hub dataset, file, folder or docstrings")
    parser.add_argument("--documents", type=int, default=1000)
    parser.add_argument("--max-tokens", type=int, default=250_000)
    parser.add_argument("--report-to", nargs="+", default=["trackio"], help="trackio, tensorboard, wandb ... or none")
    parser.add_argument("--output-dir", default="runs/tracked")
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
            "sae": TranscoderModel(TranscoderConfig.for_model(base, write, **size)),
        }
    )
    trainer = TranscoderTrainer(
        models,
        base,
        TranscoderTrainingArguments(
            args.output_dir,
            max_tokens=args.max_tokens,
            learning_rate=4e-3,
            report_to=args.report_to,
            project="transcoders",
            logging_steps=0.05,
            # Each evaluation brings a table of features, the sparsity/fidelity plot and the report page up to date.
            eval_strategy="steps",
            eval_steps=0.5,
            eval_tokens=4096,
            eval_loss_tokens=1024,
            save_strategy="no",
        ),
        train_dataset=train,
        eval_dataset=test,
        processing_class=tokenizer,
        # The trainer has such a callback by default; here it also logs sae-lens's names, and histograms more often.
        callbacks=[TranscoderTrackingCallback(aliases="saelens", histogram_logs=4)],
    )
    trainer.train()
    trainer.save_model()

    run = Run.load(args.output_dir)
    print(f"\nRun '{run.name}' {run.facts['status']}: {len(run.scalars)} logs, {len(run.alerts)} alerts")
    for name in models:
        fvu = dict(run.history(f"eval/{name}/fvu"))
        print(f"  {name}: FVU " + ", ".join(f"{value:.3f} at step {step}" for step, value in fvu.items()))
    row = run.table("features/transcoder")[-1]
    print(f"  feature {row['feature']} is active on {row['density']:.2%} of tokens: {row['context_1']!r}")
    print("\nLook further:")
    if "trackio" in trainer.args.report_to:
        print(f"  trackio show --project {trainer.args.project}")
    print(f"  {(Path(args.output_dir) / 'tracking' / 'pages' / 'report.html').resolve().as_uri()}")


if __name__ == "__main__":
    main()
