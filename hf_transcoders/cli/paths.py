"""`hf-transcoders paths`: the strongest paths through features, heads and tokens to a logit or a feature."""

import re

from ..errors import TranscoderError
from .arguments import output_arguments, prompt_arguments, target_arguments
from .common import load_base_model, load_dictionaries
from .terminal import Parser, echo, print_json
from .values import whole


_CONDITION = re.compile(r"(kind|layer|position|index)\s*(==?|!=|<=?|>=?)\s*(\S+)")


def parse(argv, prog):
    parser = Parser(
        prog=prog,
        description="Finds the strongest paths by which features, heads and tokens of a prompt contribute to a logit, to the "
        "difference of two logits, or to a feature (Dunefsky et al. 2024). Attention patterns and norm scales are frozen.",
        epilog="examples:\n"
        '  hf-transcoders paths "Mary and John went out, John gave a drink to" --transcoders runs/set \\\n'
        '      --target-difference " Mary" " John"\n'
        '  hf-transcoders paths "The war lasted from 1732 to 17" --transcoders runs/set --feature layers.8.mlp.transcoder 120\n'
        '  ... --only "kind=feature" --only "kind=head,layer>=8" --through "kind=head,layer=23,index=3" --graph',
    )
    prompt_arguments(parser)
    group = parser.add_argument_group("target")
    target_arguments(group)
    group.add_argument(
        "--feature", nargs=2, metavar=("DICTIONARY", "NUMBER"), help="feature to explain instead of a token"
    )
    group.add_argument(
        "--token-position",
        type=whole(-(2**31), 2**31 - 1),
        metavar="N",
        default=-1,
        help="position at which to explain the target; negative numbers count from the end",
    )
    group = parser.add_argument_group("search")
    group.add_argument(
        "--paths", type=whole(1), metavar="N", default=15, help="paths of each length to keep and extend"
    )
    group.add_argument("--steps", type=whole(1), metavar="N", default=3, help="steps of the longest paths")
    group.add_argument(
        "--only",
        action="append",
        default=[],
        metavar="CONDITIONS",
        help="allow only steps that meet these conditions on kind, layer, position and index (the number of a feature or "
        'head), separated by commas, such as "kind=head,layer<8"; given again, also steps that meet the others',
    )
    group.add_argument(
        "--through",
        action="append",
        default=[],
        metavar="CONDITIONS",
        help="show only paths with a step that meets these conditions; given again, with such steps in this order",
    )
    group = output_arguments(parser)
    group.add_argument("--graph", action="store_true", help="also print the paths merged into one graph")
    return parser.parse_args(argv)


def run(args):
    from ..circuits.graphs.targets import Target
    from ..circuits.paths.filters import select_paths
    from ..circuits.paths.search import greedy_paths
    from ..lm.devices import input_device

    only, through = [_filter(text) for text in args.only], [_filter(text) for text in args.through]
    if sum(given is not None for given in (args.feature, args.target, args.target_difference)) > 1:
        raise TranscoderError("Only one target can be explained: give --target, --target-difference or --feature.")
    if args.feature and not args.feature[1].isdecimal():
        raise TranscoderError(f"'{args.feature[1]}' is not the number of a feature: give --feature DICTIONARY NUMBER.")
    dictionaries = load_dictionaries(args)
    base_model, tokenizer = load_base_model(args, dictionaries)
    dictionaries.to(input_device(base_model))
    target = None
    if args.feature:
        target = Target.pre_activation(args.feature[0], int(args.feature[1]), args.token_position)
    elif args.target is not None or args.target_difference is not None:
        tokens = tuple(args.target_difference or [args.target])
        target = Target(tokens=tokens, position=args.token_position)
    elif args.token_position != -1:
        raise TranscoderError(
            "The most likely next token is explained at the last position: give --target for another position."
        )
    found = greedy_paths(
        base_model, dictionaries, args.prompt, target, tokenizer=tokenizer, num_paths=args.paths, num_steps=args.steps,
        filter=only,
    )  # fmt: skip
    chosen = found.with_levels([select_paths(level, contains=through) for level in found.levels])
    if not chosen.levels:
        raise TranscoderError("No path matches: relax --only or --through, or raise --paths.")
    graph = chosen.to_graph() if args.graph else None
    if args.json:
        print_json({**chosen.to_dict(), **({} if graph is None else {"graph": graph.to_dict()})})
        return
    echo(*str(chosen).split("\n"))
    if graph is not None:
        echo("", "merged graph, with the contributions to each node that were followed", "", *str(graph).split("\n"))


def _filter(text):
    """Parse a filter such as `kind=head,layer<8`."""
    from ..circuits.paths.filters import PathFilter

    conditions = {}
    for part in text.split(","):
        found = _CONDITION.fullmatch(part.strip())
        if found is None or (found[1] == "kind" and found[2] not in ("=", "==")) or found[1] in conditions:
            raise TranscoderError(
                f"'{text}' cannot be read: give conditions on kind, layer, position and index, each at most once and separated "
                "by commas, such as 'kind=head,layer<8'."
            )
        conditions[found[1]] = found[3] if found[1] == "kind" else f"{found[2]}{found[3]}"
    return PathFilter(**conditions)
