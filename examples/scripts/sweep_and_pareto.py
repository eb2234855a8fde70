# /// script
# dependencies = ["hf_transcoders[gguf,plots]"]
# ///
"""
Train a grid of dictionaries of one layer on the same forward passes, and plot their Pareto fronts.

    python examples/scripts/sweep_and_pareto.py                                     # SmolLM2, from a package
    python examples/scripts/sweep_and_pareto.py --model openai-community/gpt2 --layers 4 8 --group-size 8
    python examples/scripts/sweep_and_pareto.py --resume                            # after an interruption

The same from the command line: `hf-transcoders sweep examples/cli_configs/sweep_smollm2.yaml`.
"""

import argparse

from hf_transcoders import TranscoderTrainingArguments, load_language_model, load_texts, pack_tokens
from hf_transcoders.training import expand_grid, mlp_sites, run_sweep


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct", help="Hub id, folder, or name of a packaged model")
    parser.add_argument("--layers", type=int, nargs="+", default=[8])
    parser.add_argument("--k", type=int, nargs="+", default=[16, 32, 64])
    parser.add_argument("--data", default="docstrings", help="Hub dataset, file, folder or docstrings")
    parser.add_argument("--documents", type=int, default=1500)
    parser.add_argument("--max-tokens", type=int, default=300_000)
    parser.add_argument("--group-size", type=int, help="number of dictionaries trained together")
    parser.add_argument("--output-dir", default="runs/sweep")
    parser.add_argument("--resume", action="store_true")
    args = parser.parse_args()

    base, tokenizer = load_language_model(args.model)
    texts = load_texts(args.data, limit=args.documents).train_test_split(test_size=0.1, seed=0)
    train, test = pack_tokens(texts["train"], tokenizer), pack_tokens(texts["test"], tokenizer)

    width = base.config.hidden_size
    grid = expand_grid(
        base,
        [mlp_sites(layer, kind) for layer in args.layers for kind in ("transcoder", "sae")],
        num_features=[2 * width, 4 * width],
        k=args.k,
    )
    result = run_sweep(
        grid.configs,
        base,
        TranscoderTrainingArguments(
            args.output_dir,
            max_tokens=args.max_tokens,
            learning_rate=3e-3,
            save_strategy="steps",
            save_steps=0.2,
            save_total_limit=1,
        ),
        train,
        test,
        tokenizer,
        group_size=args.group_size,
        resume=args.resume,
    )
    for group in result.fronts:
        for index, dictionary in enumerate(group.dictionaries):
            metrics = dictionary.metrics
            print(
                f"{dictionary.name:44} L0 {metrics['l0']:5.1f}  FVU {metrics['fvu']:.3f}  "
                f"CE recovered {metrics['ce_recovered_zero']:.3f}  {group.standing(index)}"
            )
    print("\n".join(map(str, result.files)))


if __name__ == "__main__":
    main()
