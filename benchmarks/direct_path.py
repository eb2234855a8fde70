"""Which tokens head the lists of features' direct paths: those with the largest weights, or with the largest z-scores.

    python -m benchmarks.direct_path --transcoders runs/demo/dictionaries --dictionary layers.8.mlp.transcoder

Prints the share of listed tokens that never occur in 120,000 tokens of the text, for random features that are active on at
most 5% of tokens, and an example.
"""

import argparse

import torch

from hf_transcoders import explain_features, load_language_model, load_texts, pack_tokens
from hf_transcoders.cli.common import choose_dictionary, open_dictionaries
from hf_transcoders.data.token_texts import token_texts
from hf_transcoders.features.promoted_tokens import direct_path_scores
from hf_transcoders.lm.stream import direct_logits
from hf_transcoders.models.linear_parts import decoder_rows


_LISTED = 10


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--transcoders", required=True)
    parser.add_argument("--dictionary")
    parser.add_argument("--features", type=int, default=24)
    parser.add_argument("--tokens", type=int, default=120_000)
    args = parser.parse_args()
    dictionaries = open_dictionaries(args.transcoders)
    dictionary = dictionaries[choose_dictionary(dictionaries, args.dictionary)]
    model, tokenizer = load_language_model(dtype=torch.float32)
    rows = pack_tokens(load_texts("docstrings", limit=1_500), tokenizer, 128)
    few = -(-args.tokens // 128)
    seen = torch.zeros(model.config.vocab_size, dtype=torch.bool)
    seen[torch.tensor(rows.shuffle(seed=0)[:few]["input_ids"]).flatten()] = True
    active = explain_features(
        model, dictionary, rows, tokenizer, features="active", num_contexts=1, max_tokens=5_120, num_tokens=0,
        num_measured=0, num_quantile_contexts=0,
    )  # fmt: skip
    rare = [each.feature for each in active if each.density <= 0.05]
    order = torch.randperm(len(rare), generator=torch.Generator().manual_seed(0)).tolist()
    features = [rare[i] for i in order[: args.features]]
    found = {
        "largest weights": direct_logits(model, decoder_rows(dictionary, torch.tensor(features))),
        "z-scores over features": torch.cat(list(direct_path_scores(model, dictionary, features))),
    }
    print(f"{len(features)} features; {int(seen.sum()):,} of {len(seen):,} tokens occur in {few * 128:,} tokens")
    for name, scores in found.items():
        ends = [scores.topk(_LISTED, largest=largest).indices for largest in (True, False)]
        promoted, suppressed = [1 - seen[end].float().mean().item() for end in ends]
        repeats = [1 - len(end.unique()) / end.numel() for end in ends]
        print(
            f"{name}: never seen {promoted:.2f} of the promoted and {suppressed:.2f} of the suppressed; listed for another "
            f"feature too {repeats[0]:.2f} and {repeats[1]:.2f}"
        )
        for feature, ids in list(zip(features, ends[0].tolist(), strict=True))[:3]:
            print(f"   {feature}: {', '.join(map(repr, token_texts(tokenizer, ids[:6])))}")


if __name__ == "__main__":
    main()
