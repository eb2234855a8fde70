"""
Measure what the contexts of features cost at the end of a run: one pass over the text for each dictionary, as before, against
one pass for all of them, as the tracking callback does now.

    python benchmarks/end_of_training.py                                        # a random model of 30 layers
    python benchmarks/end_of_training.py --model smollm2-135m-instruct --tokens 512 --features 1024
"""

import argparse
import time

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hf_transcoders import TranscoderConfig, TranscoderModel, explain_features, load_language_model
from hf_transcoders.lm.architectures import num_layers


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="Hub id, folder, or name of a packaged model; by default, a random one")
    parser.add_argument("--tokens", type=int, default=4096, help="held-out tokens, as in the callback")
    parser.add_argument("--features", type=int, default=256)
    args = parser.parse_args()
    torch.manual_seed(0)
    _, tokenizer = load_language_model("smollm2-135m-instruct", dtype=torch.float32)
    if args.model:
        model, tokenizer = load_language_model(args.model, dtype=torch.float32)
    else:
        size = {"hidden_size": 64, "intermediate_size": 256, "num_attention_heads": 4, "num_hidden_layers": 30}
        model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **size)).eval()
    dictionaries = {
        f"layers.{layer}": TranscoderModel(
            TranscoderConfig.for_model(
                model, f"layers.{layer}.mlp.in", f"layers.{layer}.mlp.branch", num_features=args.features, k=16
            )
        )
        for layer in range(num_layers(model))
    }
    rows = [{"input_ids": torch.randint(1000, 20_000, (128,)).tolist()} for _ in range(args.tokens // 127 + 1)]
    options = {"num_features": 12, "num_contexts": 3, "max_tokens": args.tokens, "progress": False}
    # The last layer, whose pass is as long as that of all of them.
    one = seconds(lambda: explain_features(model, list(dictionaries.values())[-1], rows, tokenizer, **options))
    all_at_once = seconds(lambda: explain_features(model, dictionaries, rows, tokenizer, **options))
    each = seconds(lambda: [explain_features(model, d, rows, tokenizer, **options) for d in dictionaries.values()])
    print(f"one dictionary: {one:.1f} s")
    print(f"{len(dictionaries)} dictionaries, a pass for each (before): {each:.1f} s, {each / one:.1f} times as long")
    print(
        f"{len(dictionaries)} dictionaries, one pass (now): {all_at_once:.1f} s, {all_at_once / one:.1f} times as long"
    )


def seconds(function):
    """Processor time, which other processes do not lengthen."""
    start = time.process_time()
    function()
    return time.process_time() - start


if __name__ == "__main__":
    main()
