"""`hf-transcoders graph`: the attribution graph of a prompt, as files and an interactive page."""

import re

from ..errors import TranscoderError
from .arguments import add_shared, output_arguments, prompt_arguments
from .common import load_base_model, load_dictionaries
from .terminal import Parser, echo, print_json
from .values import output_folder, share, unicode_text, whole


# Tokens per row of the text that is searched for contexts.
_SEQUENCE_LENGTH = 128


def parse(argv, prog):
    parser = Parser(
        prog=prog,
        description="Computes the attribution graph of a prompt: the features, tokens and errors that the prediction of the "
        "model comes from. Writes the graph (graph.safetensors, graph.json) and, after pruning, an interactive page "
        "(graph.html) that works offline.",
        epilog="examples:\n"
        '  hf-transcoders graph "The capital of France is" --transcoders runs/set --open\n'
        '  hf-transcoders graph "When Mary and John went out, John thanked" --transcoders me/my-transcoders \\\n'
        '      --target-difference " Mary" " John" --features-from docstrings',
    )
    prompt_arguments(parser, "layers without a dictionary give one node for each MLP output")
    group = parser.add_argument_group("graph")
    group.add_argument(
        "--targets",
        type=unicode_text,
        nargs="+",
        metavar="TOKEN",
        help='next tokens to explain, such as " Mary"; by default, the most likely ones',
    )
    group.add_argument(
        "--target-difference",
        type=unicode_text,
        nargs=2,
        action="append",
        metavar=("TOKEN", "OTHER"),
        help="explain the difference of the logits of two tokens; can be given several times",
    )
    group.add_argument(
        "--max-logits",
        type=whole(1),
        metavar="N",
        help="number of most likely tokens to explain, not together with targets; by default 10",
    )
    add_shared(
        group,
        "max_features",
        "those with the most influence become nodes",
        default=2048,
    )
    group.add_argument(
        "--nodes", type=share, metavar="SHARE", default=0.8, help="share of the influence of nodes to keep on the page"
    )
    group.add_argument(
        "--edges",
        type=share,
        metavar="SHARE",
        default=0.98,
        help="share of the influence of edges to keep on the page",
    )
    group.add_argument(
        "--validate",
        type=whole(0),
        metavar="EDGES",
        default=64,
        help="number of edges on the page to validate by ablating their features; 0 validates none",
    )
    group = parser.add_argument_group("contexts of features")
    group.add_argument(
        "--features-from",
        metavar="DATA",
        help="text to search for the contexts that activate the features on the page: a Hub dataset id, a file or folder, or "
        "`docstrings`; by default, the page shows no contexts",
    )
    add_shared(group, "max_tokens", "for --features-from, by default 20,000")
    add_shared(group, "measured_contexts", "for --features-from, by default 3")
    group = output_arguments(parser, "graph.safetensors, graph.json and graph.html", default="runs/graph")
    group.add_argument(
        "--viewer",
        action="store_true",
        help="also write OUTPUT/viewer, which circuit-tracer opens: `circuit-tracer start-server --graph_file_dir OUTPUT/viewer`",
    )
    group.add_argument(
        "--feature-base-url",
        metavar="URL",
        help="public https address to which you copy the files in OUTPUT/viewer/features/NAME, for Neuronpedia; with --viewer",
    )
    group.add_argument(
        "--scan",
        metavar="ID",
        help="id of the model on Neuronpedia, such as gemma-2-2b, in place of the path at which circuit-tracer finds features; "
        "with --viewer",
    )
    group.add_argument("--open", action="store_true", help="open the page in the browser")
    return parser.parse_args(argv)


def run(args):
    if args.max_logits and (args.targets or args.target_difference):
        raise TranscoderError("--max-logits applies when no targets are given: leave it out.")
    if args.max_tokens and not args.features_from:
        raise TranscoderError("--max-tokens limits the text of --features-from: give that too.")
    for name, value in (("--feature-base-url", args.feature_base_url), ("--scan", args.scan)):
        if value is not None and not args.viewer:
            raise TranscoderError(f"{name} applies to the files for viewers: give --viewer too.")
    if args.measured_contexts is not None and not args.features_from:
        raise TranscoderError("--measured-contexts ablates features in contexts from --features-from: give that too.")
    output = output_folder(args.output)
    from ..circuits.graphs.attribution import attribution_graph
    from ..circuits.graphs.page_data import MAX_EDGES
    from ..circuits.graphs.validation import validate_edges
    from ..circuits.graphs.viewer import check_names
    from ..circuits.graphs.viewer_files import write_viewer_files
    from ..lm.devices import input_device

    if args.viewer:
        # Before the work.
        check_names(_slug(args.prompt), args.scan, args.feature_base_url)
    dictionaries = load_dictionaries(args)
    base_model, tokenizer = load_base_model(args, dictionaries)
    dictionaries = dictionaries.to(input_device(base_model))
    graph = attribution_graph(
        base_model,
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
        # The page shows a limited number of edges, and the remaining share of their influence.
        share *= 0.95
        pruned = graph.prune(args.nodes, share)
    validation = None
    if args.validate and pruned.is_kind("feature")[pruned.source].any():
        validation = validate_edges(base_model, dictionaries, pruned, args.validate)
        graph, pruned = graph.with_validation(validation), pruned.with_validation(validation)
    features = _explained(args, base_model, dictionaries, tokenizer, pruned) if args.features_from else None
    graph.save_pretrained(output)
    page = pruned.to_html(output / "graph.html", features)
    if args.viewer:
        write_viewer_files(
            output / "viewer",
            {_slug(args.prompt): pruned},
            features,
            scan=args.scan,
            feature_base_url=args.feature_base_url,
        )
    found = _summary(graph, pruned, validation, page, dictionaries)
    if args.json:
        print_json(found)
    else:
        _print(found, validation)
    if args.open:
        import webbrowser

        webbrowser.open(page.resolve().as_uri())


def _explained(args, base_model, dictionaries, tokenizer, graph):
    """Return dictionary -> explanations of its features on the page."""
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
        base_model,
        dictionaries,
        pack_tokens(load_texts(args.features_from), tokenizer, _SEQUENCE_LENGTH),
        tokenizer,
        features={name: sorted(indices) for name, indices in wanted.items()},
        max_tokens=args.max_tokens or 20_000,
        num_measured=3 if args.measured_contexts is None else args.measured_contexts,
        progress=not args.json,
    )


def _summary(graph, pruned, validation, page, dictionaries):
    return {
        "targets": [
            {"label": target.label, "probability": target.probability, "weight": target.weight}
            for target in graph.targets
        ],
        "nodes": graph.num_nodes,
        "edges": graph.num_edges,
        "largest_row_error": graph.metadata.get("largest_row_error"),
        "warning": graph.warning,
        "scores": graph.whole_scores,
        "pruned": {"num_nodes": pruned.num_nodes, "num_edges": pruned.num_edges, **pruned.metadata["pruning"]},
        "strongest": [
            {
                "label": pruned.label(number),
                "dictionary": pruned.node(number).dictionary,
                "activation": float(pruned.value[number]),
                "influence": influence,
            }
            for number, influence in pruned.strongest_features()
        ],
        "validation": validation and validation.summary(),
        "no_features": _why_no_features(graph, pruned, dictionaries),
        "page": str(page),
    }


def _print(found, validation):
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
    if found["no_features"]:
        echo("", found["no_features"])
    if validation is not None:
        echo("", *validation.to_text().split("\n"))
    echo("", found["page"])


def _why_no_features(graph, pruned, dictionaries):
    """A sentence for a page without features, or `None` if it has some."""
    if pruned.is_kind("feature").any():
        return None
    from ..lm.sites import Site

    layers = {site.layer for each in dictionaries.values() for site in map(Site.parse, each.config.output_sites)}
    carried = graph.influence()[graph.is_kind("feature")].sum().item()
    return (
        f"No feature is on the page, so there are no contexts and no validation: the dictionaries write at {len(layers)} of "
        f"{graph.num_layers} layers, and their strongest features have too little influence ({carried:.1%} together). Try "
        "--nodes 0.95, a prompt like the text that they were trained on, or dictionaries of more layers and more training."
    )


def _slug(prompt):
    return re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:60].strip("-") or "graph"
