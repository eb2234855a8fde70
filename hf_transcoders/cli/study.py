"""`hf-transcoders study`: the case studies of the paper on transcoders, on any model."""

import importlib

from .terminal import HelpFormatter, Parser


# Action -> what `--help` says of it. Each is a module of `studies`, with `add_arguments(parser)` and `run(args)`.
_ACTIONS = {
    "greater-than": "few features of a transcoder against few neurons of its MLP, on years that must come later",
    "replacement": "what the model loses with transcoders for its MLPs: each layer alone, and all of them",
    "blind": "what features fire on, guessed from weights alone and scored on text",
}


def parse(argv, prog):
    parser = Parser(
        prog=prog,
        description="Case studies of Dunefsky et al. (2024) on any model with transcoders of its MLPs.",
        epilog="examples:\n"
        "  hf-transcoders study greater-than runs/every_layer --dictionary layers.20.mlp.transcoder\n"
        "  hf-transcoders study replacement runs/every_layer --data my_text.txt",
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    actions = parser.add_subparsers(dest="action", required=True, metavar=f"{{{','.join(_ACTIONS)}}}")
    for name, text in _ACTIONS.items():
        action = actions.add_parser(name, help=text, formatter_class=HelpFormatter, allow_abbrev=False)
        # Only the module of the study in question is imported.
        if argv[:1] == [name]:
            _module(name).add_arguments(action)
    return parser.parse_args(argv)


def run(args):
    _module(args.action).run(args)


def _module(action):
    return importlib.import_module(f".studies.{action.replace('-', '_')}", __package__)
