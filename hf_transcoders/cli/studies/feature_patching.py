"""`hf-transcoders study feature-patching`."""

from pathlib import Path

from ...errors import TranscoderError
from ..arguments import add_shared, dictionary_arguments, model_arguments, output_arguments
from ..common import finish, load_base_model, load_dictionaries, open_dictionaries
from ..values import factor, output_folder, whole


def add_arguments(parser):
    parser.description = (
        "Measures how few features of a dictionary must have the activations of a counterfactual prompt (with another indirect "
        "object) to make the model predict what it predicts after that prompt, in comparison with components, neurons or other "
        "dictionaries. Features are chosen by removing those that hardly matter, at ascending thresholds."
    )
    dictionary_arguments(parser, more="each of a set is measured")
    parser.add_argument(
        "--against",
        nargs="+",
        metavar="PATH",
        default=[],
        help="further folders or Hub ids of dictionaries, such as those that `hf-transcoders baselines` writes",
    )
    # Thresholds go down to 1e-5 nats, which bfloat16 does not resolve.
    model_arguments(parser, dtype="float32")
    group = parser.add_argument_group("study")
    add_shared(group, "prompts", default=10)
    group.add_argument(
        "--thresholds",
        type=factor,
        nargs="+",
        metavar="NATS",
        default=[1e-3, 3e-3, 0.01, 0.03, 0.1, 0.3, 1.0],
        help="rises of the KL divergence by a feature below which it is removed, ascending",
    )
    group.add_argument(
        "--single-signs", action="store_true", help="also patch the two signs of a component or neuron one by one"
    )
    group.add_argument(
        "--random-orders",
        type=whole(0),
        metavar="N",
        default=1,
        help="random orders in which features are visited, besides that by attribution",
    )
    group.add_argument(
        "--tried-together",
        type=whole(1),
        metavar="N",
        default=32,
        help="features that are tried together first, at most; 1 tries each alone",
    )
    group.add_argument(
        "--max-patched", type=whole(1), metavar="N", default=512, help="number of features that the area goes to"
    )
    add_shared(group, "seed", "the same seed gives the same prompts and orders", default=0)
    output_arguments(parser, "report.html, results.json and PNG files", default="runs/feature_patching")


def run(args):
    from ...lm.devices import input_device
    from ...studies.feature_patching.patching_report import save_feature_patching
    from ...studies.feature_patching.study import feature_patching_study
    from ...tasks.ioi import indirect_object_identification

    folder = output_folder(args.output)
    dictionaries = load_dictionaries(args)
    found = [(args.transcoders, dictionaries), *((path, open_dictionaries(path)) for path in args.against)]
    base_model, tokenizer = load_base_model(args, dictionaries)
    task = indirect_object_identification(tokenizer, size=args.prompts, corruption="io_other", seed=args.seed)
    study = feature_patching_study(
        base_model,
        task,
        {name: dictionary.to(input_device(base_model)) for name, dictionary in _named(found).items()},
        thresholds=args.thresholds,
        random_orders=args.random_orders,
        single_signs=args.single_signs,
        group_size=args.tried_together,
        max_patched=args.max_patched,
        seed=args.seed,
        progress=not args.json,
    )
    finish(args, study, save_feature_patching(study, folder))


def _named(found):
    """Dictionaries of several folders by name: that of the folder if it has one dictionary, else that in the set."""
    named = {}
    for path, dictionaries in found:
        for name, dictionary in dictionaries.items():
            name = Path(path).name if len(dictionaries) == 1 else name
            if name in named:
                raise TranscoderError(f"Two dictionaries are called '{name}': give folders with different names.")
            named[name] = dictionary
    return named
