"""Compare the search for repairs with one forward pass for each forced head.

    python benchmarks/repair_search.py                                 # SmolLM2, from a package
    python benchmarks/repair_search.py --model gemma-3-270m --json

Every head from a quarter of the depth up is forced onto the wrong colors of Colored Objects. The loops run one edit after
the other on all prompts at once: whole forward passes with plain hooks, as published code has them, and forward passes of
the last token alone with a cache of the tokens before it. They run on a sample of the edits, spread over all layers, and
their time is that for all of them. Everything runs in one process, and times are processor time. Each answer of the loops
is compared with that of the search.
"""

import argparse
import json
import time

import torch

from hf_transcoders import load_language_model
from hf_transcoders.circuits import edited_attention
from hf_transcoders.studies.circuit_reuse import ForcedAttention, ForcedHead, predict_at_end, search_repair
from hf_transcoders.tasks import colored_objects, end_logits


SETS = {"wrong_colour": ("wrong_colour_1", "wrong_colour_2")}


def timed(function):
    begin = time.process_time()
    result = function()
    return result, time.process_time() - begin


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--sample", type=int, default=12, help="number of edits that the loops run")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()

    model, tokenizer = load_language_model(args.model)
    model = model.float().eval()
    task = colored_objects(tokenizer, args.prompts)
    attention = ForcedAttention(task, SETS)
    right = task.answers().right[:, 0]

    found, search_time = timed(lambda: search_repair(model, task, tokens=SETS, max_heads=1))
    tried = (~found.alone["accuracy"][0].isnan()).nonzero().tolist()
    chosen = [
        ForcedHead(tuple(tried[at]), "wrong_colour") for at in torch.linspace(0, len(tried) - 1, args.sample).long()
    ]

    def whole():
        answers = []
        for edit in chosen:
            with edited_attention(model, attention.edits([edit])):
                answers.append(end_logits(model, task).argmax(-1))
        return answers

    def cached():
        edits = {str(edit): attention.edits([edit]) for edit in chosen}
        return [each.tokens for each in predict_at_end(model, task, edits).values()]

    result = {"model": args.model, "prompts": args.prompts, "edits": len(tried), "search_seconds": search_time}
    for name, loop in (("whole forward passes", whole), ("last token alone", cached)):
        answers, seconds = timed(loop)
        seconds *= len(tried) / len(chosen)
        shares = [(each == right).double().mean().item() for each in answers]
        differing = sum(
            abs(share - found.alone["accuracy"][0][edit.head].item()) > 1e-9
            for share, edit in zip(shares, chosen, strict=True)
        )
        result[name] = {"seconds": seconds, "ratio": seconds / search_time, "differing accuracies": differing}
    if args.json:
        print(json.dumps(result))
        return
    print(f"{args.model}: {len(tried)} edits, {args.prompts} prompts; search {search_time:.1f} s of processor time")
    for name in ("whole forward passes", "last token alone"):
        each = result[name]
        print(
            f"{name}: {each['seconds']:.1f} s, {each['ratio']:.1f}x; {each['differing accuracies']} accuracies differ"
        )


if __name__ == "__main__":
    main()
