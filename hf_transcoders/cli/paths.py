"""`hf-transcoders paths`: how what a model says came about, step by step through features, heads and tokens."""

import re

from ..errors import TranscoderError
from .common import add_model_arguments, base_of, load_base_model, load_dictionaries
from .terminal import HelpFormatter, Parser, echo, print_json
from .values import unicode_text, whole


_CONDITION = re.compile(r"(kind|layer|position|index)\s*(==?|!=|<=?|>=?)\s*(\S+)")


def parse(argv, prog):
    parser = Parser(
        prog=prog,
        description="The strongest paths by which features, heads and tokens of a prompt add to a logit, to the difference of "
        "two, or to a feature (Dunefsky et al. 2024). Attention patterns and norm scales are held as they are.",
        epilog="examples:\n"
        '  hf-transcoders paths "Mary and John went out, John gave a drink to" --transcoders runs/set \\\n'
        '      --target " Mary" --against " John"\n'
        '  hf-transcoders paths "The war lasted from 1732 to 17" --transcoders runs/set --feature layers.8.mlp.transcoder 120\n'
        '  ... --only "kind=feature" --only "kind=head,layer>=8" --through "kind=head,layer=23,index=3" --graph',
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("prompt", type=unicode_text, help="text; the tokenizer's special tokens are added")
    parser.add_argument(
        "--transcoders",
        metavar="FOLDER",
        required=True,
        help="a set or a dictionary: folder that training wrote, or Hub id",
    )
    parser.add_argument("--transcoders-revision", help="commit, tag or branch of the dictionaries on the Hub")
    add_model_arguments(parser)
    # Lower precisions are rounded at every step of the model, and sums are then not exact.
    parser.set_defaults(dtype="float32")
    group = parser.add_argument_group("what is explained")
    group.add_argument(
        "--target", type=unicode_text, help="a token, often with a leading space; left out, the most likely next one"
    )
    group.add_argument(
        "--against", type=unicode_text, metavar="TOKEN", help="a token whose logit is subtracted from that of --target"
    )
    group.add_argument(
        "--feature", nargs=2, metavar=("DICTIONARY", "NUMBER"), help="a feature, active or not, instead of a logit"
    )
    group.add_argument(
        "--position",
        type=whole(-(2**31), 2**31 - 1),
        default=-1,
        help="token at which; negative numbers count from the end",
    )
    group = parser.add_argument_group("search")
    group.add_argument("--paths", type=whole(1), default=15, help="paths of each length that are kept and followed")
    group.add_argument("--steps", type=whole(1), default=3, help="steps of the longest paths")
    group.add_argument(
        "--only",
        action="append",
        default=[],
        metavar="CONDITIONS",
        help="only steps like this: conditions on kind, layer, position and index (of a feature or head), with commas, such as "
        '"kind=head,layer<8"; given again, steps like that too',
    )
    group.add_argument(
        "--through",
        action="append",
        default=[],
        metavar="CONDITIONS",
        help="show only paths with a step like this; given again, with steps like these one after the other",
    )
    parser.add_argument("--graph", action="store_true", help="the paths merged into one graph, too")
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser.parse_args(argv)


def run(args):
    from ..circuits.graphs.targets import Target
    from ..circuits.paths.filters import select_paths
    from ..circuits.paths.search import greedy_paths
    from ..lm.devices import input_device

    only, through = [_filter(text) for text in args.only], [_filter(text) for text in args.through]
    if args.feature and (args.target or args.against):
        raise TranscoderError("One thing is explained at a time: give --feature, or --target.")
    if args.against and not args.target:
        raise TranscoderError("--against is subtracted from --target: give that too.")
    if args.feature and not args.feature[1].isdecimal():
        raise TranscoderError(f"'{args.feature[1]}' is no number of a feature: give --feature DICTIONARY NUMBER.")
    dictionaries = load_dictionaries(args.transcoders, revision=args.transcoders_revision)
    name = base_of(dictionaries, args.model)
    model, tokenizer = load_base_model(name, revision=args.revision, dtype=args.dtype, device=args.device)
    dictionaries.to(input_device(model))
    target = None
    if args.feature:
        target = Target.pre_activation(args.feature[0], int(args.feature[1]), args.position)
    elif args.target:
        tokens = (args.target,) if args.against is None else (args.target, args.against)
        target = Target(tokens=tokens, position=args.position)
    elif args.position != -1:
        raise TranscoderError(
            "The most likely next token is that of the last position: give --target for another one."
        )
    found = greedy_paths(
        model, dictionaries, args.prompt, target, tokenizer=tokenizer, num_paths=args.paths, num_steps=args.steps,
        filter=only,
    )  # fmt: skip
    chosen = found.with_levels([select_paths(level, contains=through) for level in found.levels])
    if not chosen.levels:
        raise TranscoderError("No path is like that: loosen --only or --through, or raise --paths.")
    graph = chosen.to_graph() if args.graph else None
    if args.json:
        print_json({**chosen.to_dict(), **({} if graph is None else {"graph": graph.to_dict()})})
        return
    echo(*str(chosen).split("\n"))
    if graph is not None:
        echo("", "merged: what adds to each, as far as it was followed", "", *str(graph).split("\n"))


def _filter(text):
    """`kind=head,layer<8` as a filter."""
    from ..circuits.paths.filters import PathFilter

    conditions = {}
    for part in text.split(","):
        found = _CONDITION.fullmatch(part.strip())
        if found is None or (found[1] == "kind" and found[2] not in ("=", "==")) or found[1] in conditions:
            raise TranscoderError(
                f"'{text}' cannot be read: give conditions on kind, layer, position and index, each once and with commas "
                "between them, such as 'kind=head,layer<8'."
            )
        conditions[found[1]] = found[3] if found[1] == "kind" else f"{found[2]}{found[3]}"
    return PathFilter(**conditions)
