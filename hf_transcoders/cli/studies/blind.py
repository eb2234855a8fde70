"""`hf-transcoders study blind`."""

from ...errors import TranscoderError
from ...files import write_text
from ...text.strict_json import to_json
from ..common import add_model_arguments, add_text_arguments, load_base_and_rows, load_dictionaries
from ..terminal import echo, print_json
from ..values import output_file, seed, whole


def add_arguments(parser):
    parser.description = (
        "Blind case studies without a human: what each feature fires on is predicted from weights alone (de-embeddings, "
        "earlier dictionaries, strongest heads), and the prediction is scored on text."
    )
    parser.add_argument("path", help="folder or Hub id of a dictionary or set")
    parser.add_argument("--dictionary", help="which dictionary of a set; those of earlier layers help the predictions")
    parser.add_argument(
        "--features", type=whole(0), nargs="+", help="their numbers; left out, a random sample of those that fire"
    )
    parser.add_argument("--num-features", type=whole(1), default=50, help="how many, where no numbers are given")
    add_model_arguments(parser)
    add_text_arguments(parser, default_tokens=20_000)
    group = parser.add_argument_group("study")
    group.add_argument(
        "--heads", type=whole(0), default=8, help="heads of each prediction; 0 leaves preceding tokens out"
    )
    group.add_argument("--window", type=whole(1), default=16, help="preceding tokens that count")
    group.add_argument(
        "--null-features", type=whole(1), default=100, help="other features whose predictions are the baseline"
    )
    group.add_argument("--bootstrap-samples", type=whole(1), default=200, help="samples of rows behind each interval")
    group.add_argument("--batch-size", type=whole(1), default=8, help="rows of one forward")
    group.add_argument("--skip-first", type=whole(0), default=1, help="positions left out at the start of each row")
    group.add_argument("--seed", type=seed, default=0, help="the same seed gives the same numbers")
    parser.add_argument("--output", metavar="FILE.json", help="write everything there")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args):
    from ...lm.devices import input_device
    from ...studies.blind.study import blind_study

    if args.output:
        output_file(args.output)
    dictionaries = load_dictionaries(args.path)
    if args.dictionary is None and len(dictionaries) > 1:
        raise TranscoderError(
            f"The set has several dictionaries: choose one with --dictionary ({', '.join(dictionaries)})."
        )
    base, tokenizer, rows = load_base_and_rows(args, dictionaries)
    study = blind_study(
        base,
        dictionaries.to(input_device(base)),
        args.dictionary or next(iter(dictionaries)),
        rows,
        tokenizer,
        features=args.features,
        num_features=args.num_features,
        num_heads=args.heads,
        window=args.window,
        null_features=args.null_features,
        bootstrap_samples=args.bootstrap_samples,
        max_tokens=args.max_tokens,
        batch_size=args.batch_size,
        skip_first=args.skip_first,
        special_token_ids=tokenizer.all_special_ids,
        seed=args.seed,
        progress=not args.json,
    )
    if args.output:
        write_text(args.output, to_json(study.to_dict()) + "\n")
    if args.json:
        print_json(study.to_dict())
    else:
        echo(*study.to_text().split("\n"))
