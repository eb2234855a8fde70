"""`hf-transcoders study feature-tree`."""

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
        "Finds the features of earlier dictionaries that make a feature fire: each feature that is active before it is ablated, "
        "those that lower it most are its children, and theirs are found in the same way. Beside the ablations stand the edges "
        "of attribution graphs, with their rank correlation."
    )
    dictionary_arguments(parser, choose="that of the feature at the root; required if the set has several")
    parser.add_argument("--root", type=whole(0), metavar="N", required=True, help="number of the feature at the root")
    model_arguments(parser, dtype="float32")
    text_arguments(parser, max_tokens=10_000)
    group = measuring_arguments(parser, "study")
    group.add_argument("--depth", type=whole(1), metavar="N", default=2, help="levels below the root")
    group.add_argument("--children", type=whole(1), metavar="N", default=3, help="features below each feature")
    add_shared(group, "contexts", default=10)
    add_shared(group, "seed", "the same seed gives the same contexts", default=0)
    output_arguments(parser, "report.html and results.json", default="runs/feature_tree")
    # Every token of a context is run again for every feature that is active in it.
    parser.set_defaults(sequence_length=32)


def run(args):
    from ...lm.devices import input_device
    from ...studies.feature_tree.study import feature_tree_study
    from ...studies.feature_tree.tree_report import save_feature_tree

    folder = output_folder(args.output)
    dictionaries = load_dictionaries(args)
    name = choose_dictionary(dictionaries, args.dictionary)
    base_model, tokenizer = load_base_model(args, dictionaries)
    tree = feature_tree_study(
        base_model,
        dict(dictionaries.to(input_device(base_model)).items()),
        load_text(args, tokenizer),
        tokenizer,
        name,
        args.root,
        depth=args.depth,
        num_children=args.children,
        num_contexts=args.contexts,
        max_tokens=args.max_tokens,
        batch_size=args.batch_size,
        skip_first=args.skip_first,
        special_token_ids=tokenizer.all_special_ids,
        seed=args.seed,
        progress=not args.json,
    )
    finish(args, tree, save_feature_tree(tree, folder))
