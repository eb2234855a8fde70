"""`hf-transcoders evaluate`: every metric of trained dictionaries, with its protocol."""

from pathlib import Path

from ..errors import TranscoderError
from .arguments import dictionary_arguments, measuring_arguments, model_arguments, output_arguments, text_arguments
from .common import load_base_model, load_dictionaries, make_evaluator
from .terminal import Parser, echo, print_json
from .values import output_folder


def parse(argv, prog):
    parser = Parser(
        prog=prog,
        description="Measures dictionaries on text: their sparsity, their reconstruction error, and how much the loss of the "
        "language model grows when they replace its own activations.",
        epilog="example:\n"
        "  hf-transcoders evaluate --transcoders runs/l8 --data wikitext.txt --max-tokens 100000 --output runs/l8_wikitext",
    )
    dictionary_arguments(parser)
    model_arguments(parser)
    text_arguments(parser, max_tokens=50_000)
    group = measuring_arguments(parser, "evaluation", loss_tokens=10_000)
    group.add_argument("--together", action="store_true", help="also replace all sites of a set at once")
    group = output_arguments(parser, "evaluation.json; by default, nothing is written")
    group.add_argument(
        "--save",
        action="store_true",
        help="write the metrics into the config.json of each dictionary, next to its weights, and into the model card",
    )
    return parser.parse_args(argv)


def run(args):
    from ..evaluation.cautions import cautions
    from ..lm.devices import input_device

    if args.save and not Path(args.transcoders).is_dir():
        raise TranscoderError(
            f"--save writes into a folder, and {args.transcoders} is not one: download the dictionaries first."
        )
    output = output_folder(args.output) if args.output else None
    dictionaries = load_dictionaries(args)
    base_model, tokenizer = load_base_model(args, dictionaries)
    report = make_evaluator(args, base_model, tokenizer).evaluate(
        dictionaries.to(input_device(base_model)), together=args.together
    )
    if output:
        report.save_json(output / "evaluation.json")
    if args.save:
        from ..hub.cards.make import card_of_folder

        report.save_into(args.transcoders)
        card_of_folder(args.transcoders, report=report).save(args.transcoders)
    configs = {name: dictionary.config for name, dictionary in dictionaries.items()}
    found = cautions(configs, report.metrics, report.protocol["fidelity_tokens"])
    if args.json:
        print_json({**report.to_dict(), "cautions": found})
    else:
        echo(*report.to_text().split("\n"))
        for line in found.values():
            echo(f"Caution: {line}", error=True)
