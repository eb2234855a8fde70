"""`hf-transcoders study replacement`."""

from ..common import (
    add_model_arguments,
    add_text_arguments,
    load_base_and_rows,
    load_dictionaries,
    make_evaluator,
)
from ..terminal import echo, print_json
from ..values import output_folder, whole


def add_arguments(parser):
    parser.description = (
        "What a model loses when transcoders take the place of its MLPs: cross-entropy, KL and top-1 agreement for each "
        "layer alone and for all at once, against zero- and mean-ablation."
    )
    parser.add_argument("path", help="folder or Hub id of a set")
    add_model_arguments(parser)
    add_text_arguments(parser, default_tokens=20_000)
    group = parser.add_argument_group("study")
    group.add_argument("--loss-tokens", type=whole(1), default=5_000, help="tokens that measure losses")
    group.add_argument("--batch-size", type=whole(1), default=8, help="rows of one forward")
    group.add_argument("--skip-first", type=whole(0), default=1, help="positions left out at the start of each row")
    parser.add_argument(
        "--output",
        metavar="FOLDER",
        default="runs/replacement",
        help="report.html, results.json and PNG files go there",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args):
    from ...lm.devices import input_device
    from ...studies.replacement.replacement_report import save_replacement
    from ...studies.replacement.study import replacement_study

    folder = output_folder(args.output)
    dictionaries = load_dictionaries(args.path)
    base, tokenizer, rows = load_base_and_rows(args, dictionaries)
    evaluator = make_evaluator(args, base, tokenizer, rows)
    study = replacement_study(evaluator, dictionaries.to(input_device(base)), transcoders_name=args.path)
    page = save_replacement(study, folder)
    if args.json:
        print_json({**study.to_dict(), "report": str(page)})
    else:
        echo(*study.to_text().split("\n"), "", page)
