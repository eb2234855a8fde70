"""`hf-transcoders features`: what features fire on and what they write."""

from ..errors import TranscoderError
from .common import (
    add_model_arguments,
    add_text_arguments,
    load_base_and_rows,
    load_dictionaries,
)
from .terminal import HelpFormatter, Parser, echo, print_json
from .values import whole


def parse(argv, prog):
    parser = Parser(
        prog=prog,
        description="Shows what features do: the contexts in which they fire most, and the output tokens that they make "
        "more and less likely.",
        epilog="example:\n  hf-transcoders features runs/l8 --features 3 17 --data wikitext.txt",
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("path", help="folder or Hub id of a dictionary or set")
    parser.add_argument("--dictionary", help="which dictionary of a set")
    parser.add_argument("--features", type=whole(0), nargs="+", help="their numbers; left out, some that fire")
    parser.add_argument("--num-features", type=whole(1), default=10, help="how many, where no numbers are given")
    parser.add_argument("--contexts", type=whole(1), default=5, help="contexts of each feature")
    add_model_arguments(parser)
    add_text_arguments(parser, default_tokens=50_000)
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser.parse_args(argv)


def run(args):
    from ..features.feature_examples import explain_features
    from ..lm.devices import input_device

    dictionaries = load_dictionaries(args.path)
    if args.dictionary and args.dictionary not in dictionaries:
        raise TranscoderError(f"There is no dictionary '{args.dictionary}': choose from {', '.join(dictionaries)}.")
    if args.dictionary is None and len(dictionaries) > 1:
        raise TranscoderError(
            f"The set has several dictionaries: choose one with --dictionary ({', '.join(dictionaries)})."
        )
    dictionary = dictionaries[args.dictionary or next(iter(dictionaries))]
    base, tokenizer, rows = load_base_and_rows(args, dictionaries)
    explanations = explain_features(
        base,
        dictionary.to(input_device(base)),
        rows,
        tokenizer,
        features=args.features,
        num_features=args.num_features,
        num_contexts=args.contexts,
        max_tokens=args.max_tokens,
    )
    if args.json:
        print_json([explanation.to_dict() for explanation in explanations])
    else:
        text = "\n\n".join(explanation.to_text() for explanation in explanations)
        echo(*text.split("\n"))
