"""`hf-transcoders study feature-effects`."""

from ..arguments import (
    add_shared,
    dictionary_arguments,
    measuring_arguments,
    model_arguments,
    output_arguments,
    text_arguments,
)
from ..common import choose_dictionary, finish, load_base_model, load_dictionaries, load_text
from ..values import output_folder, whole


def add_arguments(parser):
    parser.description = (
        "Takes features away at the tokens where they fire, again and again until they are off, and lists the next tokens whose "
        "logits that raises and lowers, beside those of the direct path of the decoder row."
    )
    dictionary_arguments(parser, choose="required if the set has several")
    add_shared(parser, "features", nargs="+", required=True)
    model_arguments(parser)
    text_arguments(parser, max_tokens=20_000)
    group = measuring_arguments(parser, "study")
    add_shared(group, "contexts", default=20)
    group.add_argument(
        "--max-rounds", type=whole(1), metavar="N", default=20, help="times that a feature is taken away, at most"
    )
    add_shared(group, "seed", "the same seed gives the same contexts", default=0)
    output_arguments(parser, "report.html and results.json", default="runs/feature_effects")


def run(args):
    from ...lm.devices import input_device
    from ...studies.feature_effects.effects_report import save_feature_effects
    from ...studies.feature_effects.study import feature_effects_study

    folder = output_folder(args.output)
    dictionaries = load_dictionaries(args)
    name = choose_dictionary(dictionaries, args.dictionary)
    base_model, tokenizer = load_base_model(args, dictionaries)
    study = feature_effects_study(
        base_model,
        dictionaries[name].to(input_device(base_model)),
        load_text(args, tokenizer),
        tokenizer,
        args.features,
        num_contexts=args.contexts,
        max_rounds=args.max_rounds,
        max_tokens=args.max_tokens,
        batch_size=args.batch_size,
        skip_first=args.skip_first,
        special_token_ids=tokenizer.all_special_ids,
        seed=args.seed,
    )
    finish(args, study, save_feature_effects(study, folder))
