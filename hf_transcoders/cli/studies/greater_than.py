"""`hf-transcoders study greater-than`."""

import argparse

from ..arguments import add_shared, dictionary_arguments, model_arguments, output_arguments
from ..common import choose_dictionary, finish, load_base_model, load_dictionaries
from ..values import output_folder, whole


def add_arguments(parser):
    parser.description = (
        "Finds the features of one MLP's transcoder that make a model continue 'The war lasted from 1732 to 17' with a later "
        "year, and compares them with as many neurons of the MLP."
    )
    dictionary_arguments(parser, choose="required if the set has several")
    model_arguments(parser)
    group = parser.add_argument_group("study")
    group.add_argument(
        "--max-k", type=whole(1), metavar="K", default=99, help="largest number of features, and of neurons, to keep"
    )
    add_shared(group, "max_features", "those of the highest variance are also measured one by one", default=30)
    add_shared(group, "add_bos", "where figures of the paper apply, as it does", action=argparse.BooleanOptionalAction)
    add_shared(
        group, "skip_first", "the MLP stays in place there; by default 1, or 0 where figures of the paper apply"
    )
    output_arguments(parser, "report.html, results.json and PNG files", default="runs/greater_than")


def run(args):
    from ...lm.devices import input_device
    from ...studies.greater_than.greater_than_report import save_greater_than
    from ...studies.greater_than.study import greater_than_study

    folder = output_folder(args.output)
    dictionaries = load_dictionaries(args)
    name = choose_dictionary(dictionaries, args.dictionary)
    base_model, tokenizer = load_base_model(args, dictionaries)
    study = greater_than_study(
        base_model,
        dictionaries[name].to(input_device(base_model)),
        tokenizer,
        max_k=args.max_k,
        num_features=args.max_features,
        add_bos=args.add_bos,
        skip_first=args.skip_first,
        transcoders_name=args.transcoders,
        progress=not args.json,
    )
    finish(args, study, save_greater_than(study, folder))
