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
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_transcoders import offline_model
from hf_transcoders.studies.circuit_reuse import reuse_circuit, save_reuse, summary


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="Hub id or folder; by default SmolLM2-135M-Instruct from a package")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--repair-prompts", type=int, default=200)
    parser.add_argument("--output-dir", default="runs/reuse")
    args = parser.parse_args()

    path = args.model or offline_model()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    base = AutoModelForCausalLM.from_pretrained(path).to(device).eval()
    tokenizer = AutoTokenizer.from_pretrained(path)

    result = reuse_circuit(base, tokenizer, prompts=args.prompts, repair_prompts=args.repair_prompts, progress=True)
    print(summary(result))
    print(save_reuse(result, args.output_dir))


if __name__ == "__main__":
    main()
