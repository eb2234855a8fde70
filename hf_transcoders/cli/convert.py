"""`hf-transcoders convert`: convert dictionaries from and to the formats of other libraries."""

from ..errors import TranscoderError
from .arguments import add_shared, output_arguments
from .outline import LibraryNames
from .terminal import Parser, echo, print_json
from .values import factor


_NATIVE = "native"


def parse(argv, prog):
    parser = Parser(
        prog=prog,
        description="Reads a dictionary or set in the format of any supported library and writes it in another format. The "
        "options below give what the files of some libraries leave out.",
        epilog="examples:\n"
        "  hf-transcoders convert runs/all-layers out --to circuit-tracer\n"
        "  hf-transcoders convert layer_12/width_16k/average_l0_71/params.npz out --to native --base-model "
        "google/gemma-2-2b --input-site layers.12.resid_post",
    )
    parser.add_argument("source", help="folder, file or Hub id of a dictionary or set")
    parser.add_argument("target", help="folder to write; it must be new or empty")
    parser.add_argument(
        "--to",
        required=True,
        metavar="FORMAT",
        choices=LibraryNames("..models.foreign", "FORMATS", _NATIVE),
        help="format to write: %(choices)s",
    )
    add_shared(parser, "transcoders_revision")
    group = parser.add_argument_group("facts that the files of another library leave out")
    group.add_argument("--base-model", help="Hub id or folder of the language model that the dictionaries belong to")
    group.add_argument(
        "--load-base-model",
        action="store_true",
        help="load the language model, for dictionaries that read the output of a norm before its gain",
    )
    group.add_argument("--input-site", help="site to read, such as layers.8.mlp.in")
    group.add_argument("--output-site", help="site to predict, such as layers.8.mlp.branch")
    folded = group.add_mutually_exclusive_group()
    folded.add_argument(
        "--folded",
        action="store_true",
        default=None,
        help="the dictionary was trained on a model with folded norms, the default of TransformerLens",
    )
    folded.add_argument(
        "--not-folded",
        dest="folded",
        action="store_false",
        default=None,
        help="the dictionary was trained on a model without folded norms",
    )
    group.add_argument("--scaling-factor", type=factor, help="factor on the inputs of the dictionary")
    add_shared(group, "k", "where a file of a TopK dictionary does not say it")
    output_arguments(parser)
    return parser.parse_args(argv)


def run(args):
    from pathlib import Path

    from ..models.cross_layer.modeling_cross_layer import CrossLayerTranscoder
    from ..models.foreign import FOREIGN_ARGUMENTS
    from .common import load_model, open_dictionaries

    if args.load_base_model and args.base_model is None:
        raise TranscoderError("There is no language model to load: give --base-model with --load-base-model.")
    said = {name: getattr(args, name) for name in FOREIGN_ARGUMENTS if getattr(args, name) is not None}
    if args.load_base_model:
        said["base_model"], _ = load_model(args.base_model, dtype="float32", device="cpu")
    dictionaries = open_dictionaries(args.source, args.transcoders_revision, **said)
    cross_layer = isinstance(dictionaries, CrossLayerTranscoder)
    if args.to != _NATIVE:
        dictionaries.save_pretrained(args.target, format=args.to)
    elif Path(args.target).exists() and any(Path(args.target).iterdir()):
        raise TranscoderError(f"{args.target} is not empty: choose another folder.")
    elif len(dictionaries) == 1 and not cross_layer:
        dictionaries.values()[0].save_pretrained(args.target)
    else:
        dictionaries.save_pretrained(args.target)
    if args.json:
        print_json({"written": args.target, "format": args.to, "dictionaries": list(dictionaries)})
    else:
        echo(
            f"{len(dictionaries)} {'dictionary' if len(dictionaries) == 1 else 'dictionaries'} in {args.target} ({args.to})."
        )
