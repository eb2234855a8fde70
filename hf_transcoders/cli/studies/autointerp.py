"""`hf-transcoders study autointerp`."""

from ...errors import TranscoderError
from ..arguments import add_shared, measuring_arguments, model_arguments, output_arguments, text_arguments
from ..common import finish, load_base_model, load_text, open_dictionaries
from ..values import output_folder


def add_arguments(parser):
    parser.description = (
        "Compares how well the features of several kinds of dictionaries can be explained, as in Figure 2 of Cunningham et al. (2023): "
        "the same rules explain features of each, and are scored on the same text of other documents. An interrupted study goes on "
        "if it is repeated."
    )
    parser.add_argument(
        "methods",
        nargs="+",
        metavar="NAME=PATH",
        help="name of a kind, such as SAE or PCA, and the folder or Hub id of its dictionaries; all of one language model",
    )
    model_arguments(parser)
    text_arguments(parser, max_tokens=500_000)
    group = measuring_arguments(parser, "study")
    add_shared(group, "max_features", "of each dictionary, drawn at random from those that fire", default=150)
    add_shared(group, "seed", "the same seed gives the same numbers", default=0)
    output_arguments(parser, "report.html, results.json, the examples and the scores", default="runs/autointerp")


def run(args):
    from ...lm.devices import input_device
    from ...studies.autointerp.autointerp_report import save_autointerp
    from ...studies.autointerp.study import autointerp_study

    paths = {}
    for each in args.methods:
        name, equals, path = each.partition("=")
        if not (name and equals and path):
            raise TranscoderError(
                f"'{each}' is not a kind of dictionary: give its name and folder, such as SAE=runs/sae."
            )
        if name in paths:
            raise TranscoderError(f"There are two kinds of dictionary called '{name}': give each another name.")
        paths[name] = path
    folder = output_folder(args.output)
    methods = {name: open_dictionaries(path) for name, path in paths.items()}
    base_model, tokenizer = load_base_model(args, next(iter(methods.values())))
    device = input_device(base_model)
    study = autointerp_study(
        base_model, {name: each.to(device) for name, each in methods.items()}, load_text(args, tokenizer), tokenizer,
        num_features=args.max_features, max_tokens=args.max_tokens, batch_size=args.batch_size, skip_first=args.skip_first,
        output_dir=folder, seed=args.seed, progress=not args.json,
    )  # fmt: skip
    finish(args, study, save_autointerp(study, folder))
