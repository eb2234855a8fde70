"""`hf-transcoders evaluate`: every metric of trained dictionaries, with its protocol."""

from pathlib import Path

from ..errors import TranscoderError
from .common import (
    add_model_arguments,
    add_text_arguments,
    load_base_and_rows,
    load_dictionaries,
    make_evaluator,
)
from .terminal import HelpFormatter, Parser, echo, print_json
from .values import output_file, whole


def parse(argv, prog):
    parser = Parser(
        prog=prog,
        description="Measures dictionaries on text: sparsity, fidelity, and what the language model loses with them in "
        "place of its own activations.",
        epilog="example:\n  hf-transcoders evaluate runs/l8 --data wikitext.txt --max-tokens 100000 --output l8.json",
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("path", help="folder or Hub id of a dictionary or set")
    add_model_arguments(parser)
    add_text_arguments(parser, default_tokens=50_000)
    group = parser.add_argument_group("evaluation")
    group.add_argument(
        "--loss-tokens", type=whole(1), default=10_000, help="tokens that measure the language model's loss"
    )
    group.add_argument("--batch-size", type=whole(1), default=8, help="rows of one forward")
    group.add_argument("--skip-first", type=whole(0), default=1, help="positions left out at the start of each row")
    group.add_argument("--together", action="store_true", help="also splice all dictionaries of a set in at once")
    group.add_argument("--output", metavar="FILE.json", help="write the report there")
    group.add_argument(
        "--save",
        action="store_true",
        help="write the numbers into the dictionaries' config.json, from where they travel with the weights, and into "
        "the model card",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser.parse_args(argv)


def run(args):
    from ..lm.devices import input_device

    if args.save and not Path(args.path).is_dir():
        raise TranscoderError(
            f"--save writes into a folder, and {args.path} is none: download the dictionaries first."
        )
    if args.output:
        output_file(args.output)
    dictionaries = load_dictionaries(args.path)
    base, tokenizer, rows = load_base_and_rows(args, dictionaries)
    dictionaries.to(input_device(base))
    evaluator = make_evaluator(args, base, tokenizer, rows)
    report = evaluator.evaluate(dictionaries, together=args.together)
    if args.output:
        report.save_json(args.output)
    if args.save:
        from ..hub.cards.make import card_of_folder

        report.save_into(args.path)
        card_of_folder(args.path, report=report).save(args.path)
    if args.json:
        print_json(report.to_dict())
    else:
        echo(*report.to_text().split("\n"))
