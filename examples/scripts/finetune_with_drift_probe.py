# /// script
# dependencies = ["hf_transcoders[gguf,trackio]", "peft"]
# ///
"""
Fine-tune SmolLM2-135M on Python source code and measure, with transcoders of the original model, how its
features on English prose change.

    python examples/scripts/finetune_with_drift_probe.py                        # LoRA; a few minutes on two CPU cores
    python examples/scripts/finetune_with_drift_probe.py --full --learning-rate 1e-4
    python examples/scripts/finetune_with_drift_probe.py --transcoders runs/drift/transcoders    # from an earlier run
    trackio show --project drift
"""

import argparse
import sysconfig
from pathlib import Path

import torch
from datasets import Dataset
from transformers import Trainer, TrainingArguments

from hf_transcoders import (
    TranscoderConfig,
    TranscoderModel,
    TranscoderProbeCallback,
    TranscoderSet,
    TranscoderTrainer,
    TranscoderTrainingArguments,
    load_language_model,
    load_texts,
    pack_tokens,
)


CAPITALS = {
    "France": "Paris",
    "Germany": "Berlin",
    "Italy": "Rome",
    "Spain": "Madrid",
    "Japan": "Tokyo",
    "Russia": "Moscow",
    "Egypt": "Cairo",
    "Austria": "Vienna",
    "Greece": "Athens",
    "Portugal": "Lisbon",
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct", help="Hub id, folder, or name of a packaged model")
    parser.add_argument("--transcoders", help="folder or repo of a set; left out, one is trained first")
    parser.add_argument("--layers", type=int, nargs="+", default=[8, 16])
    parser.add_argument("--transcoder-tokens", type=int, default=300_000)
    parser.add_argument("--full", action="store_true", help="train all weights instead of LoRA adapters")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--probe-tokens", type=int, default=8_192)
    parser.add_argument("--report-to", default="trackio")
    parser.add_argument("--output-dir", default="runs/drift")
    args = parser.parse_args()

    model, tokenizer = load_language_model(args.model, dtype=torch.float32)

    # Prose: the docstrings of installed packages. Transcoders learn on one part of it, the probe is another.
    prose = load_texts("docstrings", limit=2_000).train_test_split(test_size=0.1, seed=0)
    if args.transcoders:
        transcoders = TranscoderSet.from_pretrained(args.transcoders)
    else:
        transcoders = train_transcoders(model, tokenizer, prose["train"], args)

    # Code: the standard library's own source. The last tenth is held out.
    code = pack_tokens(source_code(limit=120), tokenizer).train_test_split(test_size=0.1, shuffle=False)
    code = code.map(lambda row: {"labels": row["input_ids"]})

    if not args.full:
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(0)
        model = get_peft_model(model, LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM"))

    probe = TranscoderProbeCallback(
        transcoders,
        prose["test"],
        tokenizer,
        task_metrics=lambda model: {"capitals_known": capitals_known(model, tokenizer)},
        max_tokens=args.probe_tokens,
        max_loss_tokens=args.probe_tokens // 4,
    )
    trainer = Trainer(
        model,
        TrainingArguments(
            args.output_dir,
            max_steps=args.steps,
            learning_rate=args.learning_rate,
            per_device_train_batch_size=4,
            warmup_steps=5,
            eval_strategy="steps",
            eval_steps=max(1, args.steps // 5),
            logging_steps=5,
            save_strategy="no",
            report_to=args.report_to,
            project="drift",
        ),
        train_dataset=code["train"],
        eval_dataset=code["test"].select(range(8)),
        processing_class=tokenizer,
        callbacks=[probe],
    )
    trainer.train()

    losses = [(entry["step"], entry["eval_loss"]) for entry in trainer.state.log_history if "eval_loss" in entry]
    print("\nloss on held-out code: " + ", ".join(f"{loss:.3f} at step {step}" for step, loss in losses))
    metrics = [f"{name}/fvu" for name in transcoders] + ["ce", "kl", "task/capitals_known"]
    print("\nstep  " + "  ".join(metrics))
    for entry in probe.history:
        print(f"{entry['step']:4}  " + "  ".join(f"{entry[metric]:{len(metric)}.4f}" for metric in metrics))
    print(f"\n{probe.report}")
    print(f"\nThe page is {Path(args.output_dir, 'tracking', 'pages', 'probe_drift.html')}.")


def train_transcoders(model, tokenizer, texts, args):
    torch.manual_seed(0)
    configs = [
        TranscoderConfig.for_model(model, f"layers.{i}.mlp.in", f"layers.{i}.mlp.branch", num_features=4608, k=64)
        for i in args.layers
    ]
    trainer = TranscoderTrainer(
        TranscoderSet(TranscoderModel(config) for config in configs),
        model,
        TranscoderTrainingArguments(
            str(Path(args.output_dir, "transcoders")),
            max_tokens=args.transcoder_tokens,
            save_strategy="no",
            report_to="none",
        ),
        train_dataset=texts,
        processing_class=tokenizer,
    )
    trainer.train()
    trainer.save_model()
    return trainer.model


def source_code(limit):
    """Modules of the standard library, one document each."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))[:limit]
    return Dataset.from_dict({"text": [file.read_text(encoding="utf-8") for file in files]})


def capitals_known(model, tokenizer):
    """Share of countries whose capital is the most likely next token."""
    known = 0
    for country, capital in CAPITALS.items():
        prompt = tokenizer(f"The capital of {country} is the city of", return_tensors="pt").to(model.device)
        best = model(**prompt).logits[0, -1].argmax()
        known += tokenizer.decode(best).strip() == capital
    return known / len(CAPITALS)


if __name__ == "__main__":
    main()
