"""Train a transcoder of one MLP of SmolLM2-135M-Instruct on a text file and measure its fidelity on another.

    python benchmarks/fidelity.py --train valid.txt --test test.txt

The setting of `benchmarks/RESULTS.md`: WikiText-2 (word-level release, detokenised here), layer 8, 4,608 features, TopK 64,
four epochs over the validation split, evaluated on the test split. `--sae` trains the SAE of the same size and sparsity
on the same forward passes and prints both results.
"""

import argparse
import json
import platform
import resource
import time

import torch

from hf_transcoders import (
    TranscoderConfig,
    TranscoderEvaluator,
    TranscoderModel,
    TranscoderSet,
    TranscoderTrainer,
    TranscoderTrainingArguments,
    load_texts,
    pack_tokens,
)
from hf_transcoders.cli.common import load_base_model


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", required=True, help="text file to train on")
    parser.add_argument("--test", required=True, help="text file to measure on")
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--layer", type=int, default=8)
    parser.add_argument("--num-features", type=int, default=4608)
    parser.add_argument("--k", type=int, default=64)
    parser.add_argument("--epochs", type=float, default=4)
    parser.add_argument("--batch-size", type=int, default=2048)
    parser.add_argument("--sequence-length", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=5e-3)
    parser.add_argument("--eval-tokens", type=int, default=16_000)
    parser.add_argument("--loss-tokens", type=int, default=4_000)
    parser.add_argument(
        "--skip-first",
        type=int,
        default=0,
        help="positions left out and left alone at the start of each row, in training and evaluation (the library's "
        "default is 1)",
    )
    parser.add_argument("--sae", action="store_true", help="also train an SAE of the MLP's output")
    parser.add_argument("--output-dir", default="runs/fidelity")
    args = parser.parse_args()

    clock, marks = time.perf_counter(), {}

    def mark(name):
        nonlocal clock
        marks[name] = time.perf_counter() - clock
        clock = time.perf_counter()

    base, tokenizer = load_base_model(args.model, dtype=args.dtype)
    train, test = (pack_tokens(load_texts(path), tokenizer, args.sequence_length) for path in (args.train, args.test))
    mark("load and pack")

    read, write = f"layers.{args.layer}.mlp.in", f"layers.{args.layer}.mlp.branch"
    shared = {"num_features": args.num_features, "activation": "topk", "k": args.k}
    torch.manual_seed(0)
    models = {"transcoder": TranscoderModel(TranscoderConfig.for_model(base, read, write, **shared))}
    if args.sae:
        models["sae"] = TranscoderModel(TranscoderConfig.for_model(base, write, **shared))
    trainer = TranscoderTrainer(
        TranscoderSet(models),
        base,
        TranscoderTrainingArguments(
            args.output_dir,
            num_train_epochs=args.epochs,
            per_device_train_batch_size=args.batch_size,
            learning_rate=args.learning_rate,
            skip_first=args.skip_first,
            # Rows are half as long as the library's usual ones: twice as many make a forward of the same size.
            harvest_batch_size=16,
            save_strategy="no",
            report_to="none",
        ),
        train_dataset=train,
        processing_class=tokenizer,
    )
    trainer.train()
    mark("harvest and train")
    trainer.save_model()
    evaluator = TranscoderEvaluator(
        base,
        test,
        batch_size=16,
        skip_first=args.skip_first,
        max_tokens=args.eval_tokens,
        max_loss_tokens=args.loss_tokens,
        special_token_ids=tokenizer.all_special_ids,
        dataset_name="test text",
    )
    report = evaluator.evaluate(trainer.dictionaries)
    mark("evaluate")
    print(report)
    summary = {
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}",
        "device": str(base.device),
        "base dtype": str(base.dtype),
        "token steps": trainer.state.global_step * trainer.args.tokens_per_step,
        "harvested tokens": trainer.stream.harvester.tokens_harvested,
        "peak memory GiB": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
        "seconds": {name: round(value, 1) for name, value in marks.items()} | {"all": round(sum(marks.values()), 1)},
    }
    print(json.dumps(summary, indent=2))


if __name__ == "__main__":
    main()
