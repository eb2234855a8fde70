"""`hf-transcoders graph`: what made a model say what it says, as files and a page to walk through."""

import re

from .common import add_model_arguments, base_of, load_base_model, load_dictionaries
from .terminal import HelpFormatter, Parser, echo, print_json
from .values import output_folder, share, unicode_text, whole


# Tokens of one row of the text in which contexts are searched.
_SEQUENCE_LENGTH = 128


def parse(argv, prog):
    parser = Parser(
        prog=prog,
        description="The attribution graph of a prompt: which features, tokens and errors made the model say what it says. "
        "Writes the graph (graph.safetensors, graph.json) and, pruned, one page for a browser (graph.html), which works "
        "offline.",
        epilog="examples:\n"
        '  hf-transcoders graph "The capital of France is" --transcoders runs/set --open\n'
        '  hf-transcoders graph "When Mary and John went out, John thanked" --transcoders me/my-transcoders \\\n'
        '      --target-difference " Mary" " John" --features-from docstrings',
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("prompt", type=unicode_text, help="text; the tokenizer's special tokens are added")
    parser.add_argument(
        "--transcoders",
        metavar="PATH",
        required=True,
        help="folder or Hub id of a dictionary or set; layers without one give nodes of whole MLPs",
    )
    add_model_arguments(parser)
    parser.set_defaults(dtype="float32")
    group = parser.add_argument_group("graph")
    group.add_argument(
        "--targets",
        type=unicode_text,
        nargs="+",
        metavar="TOKEN",
        help='next tokens to explain, such as " Mary"; left out, the most likely ones',
    )
    group.add_argument(
        "--target-difference",
        type=unicode_text,
        nargs=2,
        action="append",
        metavar=("TOKEN", "OTHER"),
        help="explain the logit of one token less that of another; may be given several times",
    )
    group.add_argument(
        "--max-logits", type=whole(1), default=10, help="without targets: how many of the most likely tokens"
    )
    group.add_argument(
        "--max-features", type=whole(1), default=2048, help="features that become nodes, the strongest first"
    )
    group.add_argument("--nodes", type=share, default=0.8, help="share of the influence of nodes that the page keeps")
    group.add_argument("--edges", type=share, default=0.98, help="the same of their edges")
    group.add_argument(
        "--certificate",
        type=whole(0),
        metavar="EDGES",
        default=64,
        help="ablate features and compare so many edges of the page with what happens; 0 leaves it out",
    )
    group = parser.add_argument_group("contexts of features")
    group.add_argument(
        "--features-from",
        metavar="DATA",
        help="text in which to find where the features on the page fire: a Hub dataset id, a file or folder, or `docstrings`; "
        "left out, the page shows features without contexts",
    )
    group.add_argument("--max-tokens", type=whole(1), default=20_000, help="tokens to search")
    group = parser.add_argument_group("output")
    group.add_argument("--output", metavar="FOLDER", default="runs/graph", help="files go there")
    group.add_argument("--viewer", action="store_true", help="also files for published viewers of attribution graphs")
    group.add_argument("--open", action="store_true", help="open the page in the browser")
    group.add_argument("--json", action="store_true", help="print JSON")
    return parser.parse_args(argv)


def run(args):
    from ..lm.devices import input_device

    output = output_folder(args.output)
    from ..circuits.graphs.attribution import attribution_graph
    from ..circuits.graphs.page_data import MAX_EDGES
    from ..circuits.graphs.validation import certificate

    dictionaries = load_dictionaries(args.transcoders)
    base, tokenizer = load_base_model(
        base_of(dictionaries, args.model), revision=args.revision, dtype=args.dtype, device=args.device
    )
    dictionaries = dictionaries.to(input_device(base))
    graph = attribution_graph(
        base,
        dictionaries,
        args.prompt,
        tokenizer=tokenizer,
        targets=[*(args.targets or ()), *map(tuple, args.target_difference or ())] or None,
        max_logits=args.max_logits,
        max_features=args.max_features,
        progress=not args.json,
    )
    pruned, share = graph.prune(args.nodes, args.edges), args.edges
    while pruned.num_edges > MAX_EDGES:
        # More than a page shows: the weakest go, and the page says which share is left.
        share *= 0.95
        pruned = graph.prune(args.nodes, share)
    certified = None
    if args.certificate and pruned.is_kind("feature")[pruned.source].any():
        certified = certificate(base, dictionaries, pruned, args.certificate)
        graph.metadata["certificate"] = pruned.metadata["certificate"]
    features = _explained(args, base, dictionaries, tokenizer, pruned) if args.features_from else None
    graph.save_pretrained(output)
    page = pruned.to_html(output / "graph.html", features, certified)
    if args.viewer:
        from ..circuits.graphs.viewer import write_viewer_files

        write_viewer_files(output / "viewer", {_slug(args.prompt): pruned}, features)
    found = _summary(graph, pruned, certified, page)
    if args.json:
        print_json(found)
    else:
        _print(found, certified)
    if args.open:
        import webbrowser

        webbrowser.open(page.resolve().as_uri())


def _explained(args, base, dictionaries, tokenizer, graph):
    """Dictionary -> explanations of its features on the page."""
    from ..data.packing import pack_tokens
    from ..data.text import load_texts
    from ..features.feature_examples import explain_features

    wanted: dict[str, set[int]] = {}
    has = graph.is_kind("feature")
    for dictionary, index in zip(graph.dictionary[has].tolist(), graph.index[has].tolist(), strict=True):
        wanted.setdefault(graph.dictionaries[dictionary], set()).add(index)
    if not wanted:
        return None
    return explain_features(
        base,
        dictionaries,
        pack_tokens(load_texts(args.features_from), tokenizer, _SEQUENCE_LENGTH),
        tokenizer,
        features={name: sorted(indices) for name, indices in wanted.items()},
        max_tokens=args.max_tokens,
        progress=not args.json,
    )


def _summary(graph, pruned, certified, page, strongest=10):
    from ..circuits.graphs.influence import scores

    influence = pruned.influence()
    features = pruned.is_kind("feature")
    order = influence.masked_fill(~features, -1).argsort(descending=True)[: min(strongest, int(features.sum()))]
    return {
        "targets": [
            {"label": target.label, "probability": target.probability, "weight": target.weight}
            for target in graph.targets
        ],
        "nodes": graph.num_nodes,
        "edges": graph.num_edges,
        "largest_row_error": graph.metadata.get("largest_row_error"),
        "warning": graph.warning,
        "scores": scores(graph),
        "pruned": {"num_nodes": pruned.num_nodes, "num_edges": pruned.num_edges, **pruned.metadata["pruning"]},
        "strongest": [
            {
                "label": pruned.label(number),
                "dictionary": pruned.node(number).dictionary,
                "activation": float(pruned.value[number]),
                "influence": float(influence[number]),
            }
            for number in order.tolist()
        ],
        "certificate": certified and certified.summary(),
        "page": str(page),
    }


def _print(found, certified):
    echo("targets")
    for target in found["targets"]:
        share = "" if target["probability"] is None else f"{target['probability']:7.1%}"
        echo(f"  {share:>7}  {target['label']!r}")
    scores, pruned = found["scores"], found["pruned"]
    if found["warning"]:
        echo("", f"WARNING: {found['warning']}")
    echo(
        "",
        f"{found['nodes']:,} nodes, {found['edges']:,} edges: replacement {scores['replacement']:.3f}, completeness "
        f"{scores['completeness']:.3f}, {scores['rest']:.1%} of the influence not in the graph",
        f"page: {pruned['num_nodes']:,} nodes, {pruned['num_edges']:,} edges ({pruned['edges']:.0%} of their influence); {pruned['dropped_error_nodes']:,} error nodes with "
        f"{pruned['dropped_error_influence']:.1%} of the influence are not on it",
    )
    if found["strongest"]:
        echo("", "strongest features")
        for feature in found["strongest"]:
            echo(f"  {feature['influence']:6.3f}  {feature['label']}, activation {feature['activation']:.3g}")
    if certified is not None:
        echo("", *str(certified).split("\n"))
    echo("", found["page"])


def _slug(prompt):
    return re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:60].strip("-") or "graph"
