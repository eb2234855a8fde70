"""`hf-transcoders study greater-than`."""

import argparse

from ...errors import TranscoderError
from ..common import add_model_arguments, base_of, load_base_model, load_dictionaries
from ..terminal import echo, print_json
from ..values import output_folder, whole


def add_arguments(parser):
    parser.description = (
        "Which features of one MLP's transcoder make a model name a later year after 'The war lasted from 1732 to 17', and "
        "how few of them do as well as neurons."
    )
    parser.add_argument("path", help="folder or Hub id of a dictionary or set")
    parser.add_argument("--dictionary", help="which dictionary of a set")
    add_model_arguments(parser)
    group = parser.add_argument_group("study")
    group.add_argument("--max-k", type=whole(1), default=99, help="the most features, and neurons, of the curves")
    group.add_argument("--num-features", type=whole(1), default=30, help="features to look at one by one")
    group.add_argument(
        "--add-bos",
        action=argparse.BooleanOptionalAction,
        help="begin prompts with the beginning-of-sequence token; left out, as the tokenizer does, and as the paper does "
        "where its figures are of this model and transcoder",
    )
    group.add_argument(
        "--skip-first",
        type=whole(0),
        help="positions at the start that stay unchanged; left out, 1, and none where the paper's figures apply",
    )
    parser.add_argument(
        "--output",
        metavar="FOLDER",
        default="runs/greater_than",
        help="report.html, results.json and PNG files go there",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args):
    from ...lm.devices import input_device
    from ...studies.greater_than.greater_than_report import save_greater_than
    from ...studies.greater_than.study import greater_than_study

    folder = output_folder(args.output)
    dictionaries = load_dictionaries(args.path)
    if args.dictionary and args.dictionary not in dictionaries:
        raise TranscoderError(f"There is no dictionary '{args.dictionary}': choose from {', '.join(dictionaries)}.")
    if args.dictionary is None and len(dictionaries) > 1:
        raise TranscoderError(
            f"The set has several dictionaries: choose one with --dictionary ({', '.join(dictionaries)})."
        )
    transcoder = dictionaries[args.dictionary or next(iter(dictionaries))]
    name = base_of(dictionaries, args.model)
    model, tokenizer = load_base_model(name, revision=args.revision, dtype=args.dtype, device=args.device)
    study = greater_than_study(
        model,
        transcoder.to(input_device(model)),
        tokenizer,
        max_k=args.max_k,
        num_features=args.num_features,
        add_bos=args.add_bos,
        skip_first=args.skip_first,
        transcoders_name=args.path,
        progress=not args.json,
    )
    page = save_greater_than(study, folder)
    if args.json:
        print_json({**study.to_dict(), "report": str(page)})
    else:
        echo(*study.to_text().split("\n"), "", page)
