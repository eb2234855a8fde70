"""
Measure how fast the examples of all features are collected, against reading the activations of the language model alone.

    python benchmarks/feature_examples.py                      # SmolLM2-135M, layer 8, 4,608 features, 64 active
    python benchmarks/feature_examples.py --features 24576 --tokens 65536
"""

import argparse
import resource
import time

import torch
from tqdm import tqdm

from hf_transcoders import TranscoderConfig, TranscoderModel, load_language_model, load_texts, pack_tokens
from hf_transcoders.features import ExampleSizes
from hf_transcoders.features.collect import dictionary_inputs, read_all
from hf_transcoders.features.running_examples import RunningExamples
from hf_transcoders.features.text_sample import sample_text


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--data", default="docstrings")
    parser.add_argument("--dictionary", help="folder of a trained dictionary; by default, a random one")
    parser.add_argument("--layer", type=int, default=8)
    parser.add_argument("--features", type=int, default=4608)
    parser.add_argument("--k", type=int, default=64, help="active features; 0 is a ReLU with half of them active")
    parser.add_argument("--tokens", type=int, default=131_072)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    model, tokenizer = load_language_model(args.model, dtype=torch.float32)
    if args.dictionary:
        dictionary = TranscoderModel.from_pretrained(args.dictionary).eval()
    else:
        kind = {"activation": "topk", "k": args.k} if args.k else {"activation": "relu"}
        sites = f"layers.{args.layer}.mlp.in", f"layers.{args.layer}.mlp.branch"
        dictionary = TranscoderModel(TranscoderConfig.for_model(model, *sites, num_features=args.features, **kind))
    rows = pack_tokens(load_texts(args.data), tokenizer, 128)
    sample = sample_text(rows, max_tokens=args.tokens, skip_first=1, separator=tokenizer.eos_token_id)
    count = range(dictionary.config.num_features)
    running = {"all": RunningExamples(count, dictionary, sample, ExampleSizes())}
    print(f"{sample.blocks.tokens:,} tokens, {len(count):,} features")
    # Batches of both in turn, so that what else the machine does slows down both.
    base_seconds = pass_seconds = 0.0
    with torch.no_grad():
        for batch in tqdm(list(sample.blocks.batches(model, args.batch_size))):
            start = time.perf_counter(), time.process_time()
            dictionary_inputs(model, [dictionary], batch)
            middle = time.process_time()
            read_all(model, running, _One(sample, batch), args.batch_size, progress=False)
            base_seconds += middle - start[1]
            pass_seconds += time.process_time() - middle
    tokens = sample.blocks.tokens
    print(f"language model alone: {tokens / base_seconds:,.0f} tokens per second of processor time")
    print(f"examples of all features: {tokens / pass_seconds:,.0f} tokens per second of processor time")
    print(f"ratio: {base_seconds / pass_seconds:.2f}")
    size = sum(tensor.numel() * tensor.element_size() for tensor in running["all"].state().values())
    print(f"kept: {size / 2**20:,.0f} MiB, {size / len(count):,.0f} bytes for each feature")
    print(f"peak memory of the process: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB")


class _One:
    """A sample of one batch."""

    def __init__(self, sample, batch):
        self.blocks, self.batch = self, batch
        self.texts = sample.blocks.texts[: len(batch.numbers)]

    def batches(self, model, batch_size):
        return iter([self.batch])


if __name__ == "__main__":
    main()
