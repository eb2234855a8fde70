"""`hf-transcoders features`: contexts of features, the tokens that they promote, and their effects in the model."""

from .arguments import (
    add_shared,
    dictionary_arguments,
    feature_arguments,
    model_arguments,
    output_arguments,
    text_arguments,
)
from .common import choose_dictionary, load_base_model, load_dictionaries, load_text
from .terminal import Parser, echo, print_json


def parse(argv, prog):
    parser = Parser(
        prog=prog,
        description="Shows the contexts in which features are most active and random ones from each quarter of their "
        "activations, in rows drawn from all of the text; the tokens that their direct path to the logits promotes and "
        "suppresses, compared with other features; and what ablating them at their top contexts changes in the model.",
        epilog="example:\n  hf-transcoders features --transcoders runs/l8 --features 3 17 --data wikitext.txt",
    )
    dictionary_arguments(parser, choose="required if the set has several")
    feature_arguments(parser, "features that are active in the text", 10)
    add_shared(parser, "contexts", default=5)
    add_shared(parser, "measured_contexts", default=3)
    model_arguments(parser)
    text_arguments(parser, max_tokens=50_000)
    output_arguments(parser)
    return parser.parse_args(argv)


def run(args):
    from ..features.feature_examples import explain_features
    from ..lm.devices import input_device

    dictionaries = load_dictionaries(args)
    name = choose_dictionary(dictionaries, args.dictionary)
    base_model, tokenizer = load_base_model(args, dictionaries)
    explanations = explain_features(
        base_model,
        dictionaries[name].to(input_device(base_model)),
        load_text(args, tokenizer),
        tokenizer,
        features=args.features,
        num_features=args.max_features,
        num_contexts=args.contexts,
        max_tokens=args.max_tokens,
        num_measured=args.measured_contexts,
    )
    if args.json:
        print_json([explanation.to_dict() for explanation in explanations])
    else:
        text = "\n\n".join(explanation.to_text() for explanation in explanations)
        echo(*text.split("\n"))
