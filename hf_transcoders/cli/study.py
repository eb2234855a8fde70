"""`hf-transcoders study`: case studies of papers on transcoders and sparse autoencoders, on any model."""

import importlib

from .terminal import Parser


# Action -> its line in `--help`. Each is a module of `studies` with `add_arguments(parser)` and `run(args)`.
_ACTIONS = {
    "greater-than": "compare few features of a transcoder with few neurons of its MLP, on prompts about years",
    "replacement": "measure the loss with transcoders in place of MLPs: each layer alone, and all of them",
    "feature-patching": "make a model predict the counterfactual answer with few features, against components and neurons",
    "feature-effects": "ablate features until they are off, and list the next tokens that this raises and lowers",
    "feature-tree": "find the earlier features that make a feature fire, beside attribution edges",
    "autointerp": "compare how well the features of several kinds of dictionaries can be explained",
    "blind": "predict from weights alone when features are active, and score the predictions on text",
}


def parse(argv, prog):
    parser = Parser(
        prog=prog,
        description="Case studies of Dunefsky et al. (2024) and Cunningham et al. (2023), on any model with dictionaries.",
        epilog="examples:\n"
        "  hf-transcoders study greater-than --transcoders runs/every_layer --dictionary layers.20.mlp.transcoder\n"
        "  hf-transcoders study replacement --transcoders runs/every_layer --data my_text.txt\n"
        "  hf-transcoders study feature-patching --transcoders runs/sae_2023 --against runs/baselines/pca",
    )
    actions = parser.add_subparsers(dest="action", required=True, metavar=f"{{{','.join(_ACTIONS)}}}")
    for name, text in _ACTIONS.items():
        action = actions.add_parser(name, help=text)
        # Only the module of the chosen study is imported.
        if argv[:1] == [name]:
            _module(name).add_arguments(action)
    return parser.parse_args(argv)


def run(args):
    _module(args.action).run(args)


def _module(action):
    return importlib.import_module(f".studies.{action.replace('-', '_')}", __package__)
