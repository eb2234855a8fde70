"""Train a cross-layer transcoder of some layers of SmolLM2-135M-Instruct and per-layer transcoders, and compare them.

    python benchmarks/cross_layer.py --train valid.txt --test test.txt

The setting of `benchmarks/RESULTS.md`: WikiText-2 (word-level release, detokenised here), MLPs of layers 4 to 7. The rows are
trained on the same tokens with the same number of active features: transcoders with as many parameters as the cross-layer
transcoder, the cross-layer transcoder and, with `--all-rows`, transcoders with as many features, and a cross-layer transcoder
that starts from such a set after half of the tokens. Measured: FVU of each layer, the loss with all layers replaced at once, and the scores of attribution graphs of
some test sentences.
"""

import argparse

import torch

from hf_transcoders import (
    CrossLayerTranscoder,
    CrossLayerTranscoderConfig,
    TranscoderConfig,
    TranscoderEvaluator,
    TranscoderModel,
    TranscoderSet,
    TranscoderTrainer,
    TranscoderTrainingArguments,
    load_texts,
    pack_tokens,
    splice,
)
from hf_transcoders.circuits import attribution_graph
from hf_transcoders.cli.common import load_model


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", required=True, help="text file to train on")
    parser.add_argument("--test", required=True, help="text file to measure on")
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--layers", type=int, nargs="+", default=[4, 5, 6, 7])
    parser.add_argument(
        "--num-features", type=int, default=1024, help="features of a layer of the cross-layer transcoder"
    )
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=200_000)
    parser.add_argument("--batch-size", type=int, default=1024)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--eval-tokens", type=int, default=16_000)
    parser.add_argument("--loss-tokens", type=int, default=4_000)
    parser.add_argument("--graphs", type=int, default=8, help="number of prompts, of 16 tokens each")
    parser.add_argument("--max-features", type=int, default=256, help="features of a graph that have rows")
    parser.add_argument("--all-rows", action="store_true", help="also train the third and the fourth row")
    parser.add_argument("--output-dir", default="runs/cross-layer")
    args = parser.parse_args()

    base, tokenizer = load_model(args.model, dtype=args.dtype)
    train, test = (pack_tokens(load_texts(path), tokenizer, 128) for path in (args.train, args.test))
    evaluator = TranscoderEvaluator(
        base,
        test,
        batch_size=8,
        max_tokens=args.eval_tokens,
        max_loss_tokens=args.loss_tokens,
        special_token_ids=tokenizer.all_special_ids,
    )
    prompts = [row["input_ids"][:16] for _, row in zip(range(args.graphs), test, strict=False)]

    layers = len(args.layers)
    shared = {"activation": "topk", "k": args.k}
    config = CrossLayerTranscoderConfig.for_model(base, args.layers, num_features=args.num_features, **shared)
    # An encoder and a decoder for each layer, against encoders and a decoder for each pair of layers.
    equal = args.num_features * (layers + layers * (layers + 1) // 2) // (2 * layers)

    def per_layer(num_features):
        torch.manual_seed(0)
        sites = zip(config.input_sites, config.output_sites, strict=True)
        configs = [TranscoderConfig.for_model(base, *pair, num_features=num_features, **shared) for pair in sites]
        return TranscoderSet([TranscoderModel(each) for each in configs])

    def trained(name, model, tokens=args.tokens):
        trainer = TranscoderTrainer(
            model,
            base,
            TranscoderTrainingArguments(
                f"{args.output_dir}/{name}",
                max_tokens=tokens,
                per_device_train_batch_size=args.batch_size,
                learning_rate=args.learning_rate,
                activation_cache_dir=f"{args.output_dir}/activations",
                save_strategy="no",
                report_to="none",
            ),
            train_dataset=train,
            processing_class=tokenizer,
        )
        trainer.train()
        trainer.save_model()
        return trainer.model.eval()

    @torch.no_grad()
    def measured(name, model):
        reconstruction, features = evaluator.measure_fidelity(dict(model.items()))
        replaced = {"all": lambda mask: splice(base, model, error="drop", features=False, mask=mask)}
        losses = evaluator.measure_changes(replaced, first_block=args.layers[0])
        losses = {key: statistics.compute() for key, statistics in losses.items()}
        scores = []
        for prompt in prompts:
            graph = attribution_graph(base, model, prompt, max_features=args.max_features, progress=False)
            scores.append(graph.scores())
        mean = {key: sum(each[key] for each in scores) / len(scores) for key in ("replacement", "completeness")}
        fvu = [each.compute()["fvu"] for each in reconstruction.values()]
        cells = [
            name,
            f"{next(iter(model.values())).config.num_features:,}",
            f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M",
            f"{sum(each.compute()['l0'] for each in features.values()):.0f}",
            " ".join(f"{each:.3f}" for each in fvu),
            f"{sum(fvu) / len(fvu):.3f}",
            f"{losses['original']['ce']:.3f}",
            f"{losses['all']['ce']:.3f}",
            f"{losses['all']['kl']:.3f}",
            f"{mean['replacement']:.4f}",
            f"{mean['completeness']:.4f}",
        ]
        print("| " + " | ".join(cells) + " |", flush=True)

    head = (
        "row",
        "features a layer",
        "parameters",
        "L0 in all",
        "FVU of each layer",
        "mean FVU",
        "CE",
        "CE replaced",
        "KL",
    )
    head += ("replacement score", "completeness score")
    print("| " + " | ".join(head) + " |\n" + "|---" * len(head) + "|", flush=True)
    measured("per layer, equal parameters", trained("per-layer-wide", per_layer(equal)))
    torch.manual_seed(0)
    measured("cross-layer", trained("cross-layer", CrossLayerTranscoder(config)))
    if args.all_rows:
        measured("per layer, equal features", trained("per-layer", per_layer(args.num_features)))
        half = trained("per-layer-half", per_layer(args.num_features), args.tokens // 2)
        padded = trained("cross-layer-half", CrossLayerTranscoder.from_set(half), args.tokens // 2)
        measured("cross-layer, from half a per-layer run", padded)


if __name__ == "__main__":
    main()
