"""`hf-transcoders study blind`."""

from ...files import write_text
from ...text.strict_json import to_json
from ..arguments import (
    add_shared,
    dictionary_arguments,
    feature_arguments,
    measuring_arguments,
    model_arguments,
    output_arguments,
    text_arguments,
)
from ..common import choose_dictionary, finish, load_base_model, load_dictionaries, load_text
from ..values import output_folder, whole


def add_arguments(parser):
    parser.description = (
        "Blind case studies without a human: predicts from weights alone (de-embeddings, earlier dictionaries, strongest "
        "heads) on which tokens each feature is active, and scores the predictions on text."
    )
    dictionary_arguments(parser, choose="those of earlier layers contribute to the predictions")
    feature_arguments(parser, "a random sample of features that are active in the text", 50)
    model_arguments(parser)
    text_arguments(parser, max_tokens=20_000)
    group = measuring_arguments(parser, "study")
    group.add_argument(
        "--heads", type=whole(0), metavar="N", default=8, help="heads per prediction; 0 ignores preceding tokens"
    )
    group.add_argument("--window", type=whole(1), metavar="N", default=16, help="preceding tokens that count")
    group.add_argument(
        "--null-features",
        type=whole(1),
        metavar="N",
        default=100,
        help="number of other features whose predictions are the baseline",
    )
    group.add_argument(
        "--bootstrap-samples", type=whole(1), metavar="N", default=200, help="bootstrap samples for each interval"
    )
    add_shared(group, "seed", "the same seed gives the same numbers", default=0)
    output_arguments(parser, "results.json; by default, nothing is written")


def run(args):
    from ...lm.devices import input_device
    from ...studies.blind.study import blind_study

    folder = output_folder(args.output) if args.output else None
    dictionaries = load_dictionaries(args)
    name = choose_dictionary(dictionaries, args.dictionary)
    base_model, tokenizer = load_base_model(args, dictionaries)
    study = blind_study(
        base_model,
        dictionaries.to(input_device(base_model)),
        name,
        load_text(args, tokenizer),
        tokenizer,
        features=args.features,
        num_features=args.max_features,
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
    if folder:
        write_text(folder / "results.json", to_json(study.to_dict()) + "\n")
    finish(args, study)
