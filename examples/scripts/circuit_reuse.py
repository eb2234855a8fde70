# /// script
# dependencies = ["hf_transcoders[gguf,plots]"]
# ///
"""
Compare the heads of indirect object identification (IOI) and Colored Objects, and repair one task with the heads of the other.

    python examples/scripts/circuit_reuse.py                                          # SmolLM2, from a package
    python examples/scripts/circuit_reuse.py --model openai-community/gpt2-medium     # with the paper's figures
"""

import argparse

import torch

from hf_transcoders import load_language_model
from hf_transcoders.studies.circuit_reuse import reuse_circuit, save_reuse


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct", help="Hub id, folder, or name of a packaged model")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--repair-prompts", type=int, default=200)
    parser.add_argument("--output-dir", default="runs/reuse")
    args = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, tokenizer = load_language_model(args.model)
    model = model.to(device).eval()

    result = reuse_circuit(model, tokenizer, prompts=args.prompts, repair_prompts=args.repair_prompts, progress=True)
    print(result)
    print(save_reuse(result, args.output_dir))


if __name__ == "__main__":
    main()
