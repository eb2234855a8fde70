"""`hf-transcoders graph`: the attribution graphs of prompts, as files and an interactive page."""

import re
from pathlib import Path

from ..errors import TranscoderError
from .arguments import add_shared, output_arguments, prompt_arguments, target_arguments
from .common import load_base_model, load_dictionaries
from .terminal import Parser, echo, print_json
from .values import output_folder, share, whole


# Tokens per row of the text that is searched for contexts.
_SEQUENCE_LENGTH = 128


def parse(argv, prog):
    parser = Parser(
        prog=prog,
        description="Computes the attribution graph of a prompt: the features, tokens and errors that the prediction of the "
        "model comes from. Writes the graph (graph.safetensors, graph.json) and, after pruning, an interactive page "
        "(graph.html) that works offline. Several prompts share one page, and each graph has a folder.",
        epilog="examples:\n"
        '  hf-transcoders graph "The capital of France is" --transcoders runs/set --open\n'
        '  hf-transcoders graph "The capital of France is" "The capital of Italy is" --transcoders runs/set\n'
        '  hf-transcoders graph "When Mary and John went out, John thanked" --transcoders me/my-transcoders \\\n'
        '      --target-difference " Mary" " John" --features-from docstrings',
    )
    prompt_arguments(parser, "layers without a dictionary give one node for each MLP output", several=True)
    group = parser.add_argument_group("graph")
    target_arguments(group, several=True)
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
    group = parser.add_argument_group("page")
    group.add_argument(
        "--labels",
        metavar="FILE",
        help="labels of features, pins and groups to show on the page: a file that the page of a graph saved; by default, the "
        "explanations that `hf-transcoders explain` saved with the dictionaries",
    )
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
    # Prompts may stand before, between and after options.
    return parser.parse_intermixed_args(argv)


def run(args):
    if args.max_logits and (args.target or args.target_difference):
        raise TranscoderError("--max-logits applies when no targets are given: leave it out.")
    if args.max_tokens and not args.features_from:
        raise TranscoderError("--max-tokens limits the text of --features-from: give that too.")
    for name, value in (("--feature-base-url", args.feature_base_url), ("--scan", args.scan)):
        if value is not None and not args.viewer:
            raise TranscoderError(f"{name} applies to the files for viewers: give --viewer too.")
    if args.measured_contexts is not None and not args.features_from:
        raise TranscoderError("--measured-contexts ablates features in contexts from --features-from: give that too.")
    prompts = _prompts(args)
    slugs = _slugs(prompts)
    output = output_folder(args.output)
    from ..circuits.graphs.attribution import attribution_graph
    from ..circuits.graphs.page_data import page_data
    from ..circuits.graphs.page_labels import LONGEST, read_labels
    from ..circuits.graphs.viewer import check_names
    from ..circuits.graphs.viewer_files import write_viewer_files
    from ..features.explain.explanation_file import saved_labels
    from ..lm.devices import input_device
    from ..reports.graph.graph_page import write_graph

    # Refused before any work starts.
    if args.labels:
        read_labels(args.labels)
    for slug in slugs if args.viewer else ():
        check_names(slug, args.scan, args.feature_base_url)
    dictionaries = load_dictionaries(args)
    labels = args.labels or saved_labels(args.transcoders, dict(dictionaries.items()), LONGEST) or None
    base_model, tokenizer = load_base_model(args, dictionaries)
    dictionaries = dictionaries.to(input_device(base_model))
    whole_graphs = attribution_graph(
        base_model,
        dictionaries,
        prompts,
        tokenizer=tokenizer,
        targets=[*(args.target or ()), *map(tuple, args.target_difference or ())] or None,
        max_logits=args.max_logits,
        max_features=args.max_features,
        progress=not args.json,
    )
    graphs, pruned, validations = [], [], []
    for graph in whole_graphs:
        part, validation = _for_page(args, base_model, dictionaries, graph)
        graphs.append(graph if validation is None else graph.with_validation(validation))
        pruned.append(part)
        validations.append(validation)
    features = _explained(args, base_model, dictionaries, tokenizer, pruned) if args.features_from else None
    if args.features_from and features is None:
        note = f"--features-from {args.features_from} was not searched: without features on the page there are no contexts to find."
        pruned = [part.with_note(note) for part in pruned]
    # Labels of other dictionaries are refused before anything is written.
    data = page_data(pruned, features, labels)
    for slug, graph in zip(slugs, graphs, strict=True):
        graph.save_pretrained(output if len(graphs) == 1 else output / slug)
    page = write_graph(output / "graph.html", data)
    if args.viewer:
        write_viewer_files(
            output / "viewer",
            dict(zip(slugs, pruned, strict=True)),
            features,
            scan=args.scan,
            feature_base_url=args.feature_base_url,
        )
    found = list(map(_summary, graphs, pruned, validations))
    if args.json:
        alone = found[0] if len(found) == 1 else {"graphs": found}
        print_json({**alone, "page": str(page)})
    else:
        for prompt, summary, validation in zip(prompts, found, validations, strict=True):
            if len(found) > 1:
                echo(f"prompt: {prompt}", "")
            _print(summary, validation)
            echo()
        echo(page)
    if args.open:
        import webbrowser

        webbrowser.open(page.resolve().as_uri())


def _prompts(args):
    prompts = list(args.prompt)
    if args.prompts_from:
        try:
            lines = Path(args.prompts_from).read_text(encoding="utf-8").splitlines()
        except (OSError, ValueError) as error:
            raise TranscoderError(
                f"{args.prompts_from} could not be read ({error}): give a text file in UTF-8 with one prompt on each line."
            ) from error
        prompts += [line for line in lines if line.strip()]
    if not prompts:
        raise TranscoderError(
            f"{args.prompts_from} has no prompt: write one on each line."
            if args.prompts_from
            else "There is no prompt: give a text, several texts, or --prompts-from."
        )
    return prompts


def _for_page(args, base_model, dictionaries, graph):
    """Prune a graph for the page and validate it; anything that is not possible becomes a note on the page."""
    from ..circuits.graphs.page_data import MAX_EDGES
    from ..circuits.graphs.validation import validate_edges

    pruned, share = graph.prune(args.nodes, args.edges), args.edges
    while pruned.num_edges > MAX_EDGES:
        # The page shows a limited number of edges, and the remaining share of their influence.
        share *= 0.95
        pruned = graph.prune(args.nodes, share)
    if share < args.edges:
        pruned = pruned.with_note(
            f"A page shows up to {MAX_EDGES:,} edges: it has those with {share:.0%} of the influence, not {args.edges:.0%}."
        )
    if not args.validate:
        return pruned, None
    if not pruned.is_kind("feature")[pruned.source].any():
        return pruned.with_note("The graph was not validated: no feature on the page has an edge that could be."), None
    validation = validate_edges(base_model, dictionaries, pruned, args.validate)
    return pruned.with_validation(validation), validation


def _explained(args, base_model, dictionaries, tokenizer, graphs):
    """Return dictionary -> explanations of its features on the page; `None` if it has no features."""
    from ..data.packing import pack_tokens
    from ..data.text import load_texts
    from ..features.feature_examples import explain_features

    wanted: dict[str, set[int]] = {}
    for graph in graphs:
        for name, numbers in graph.feature_numbers().items():
            wanted.setdefault(name, set()).update(numbers)
    if not wanted:
        return None
    return explain_features(
        base_model,
        dictionaries,
        pack_tokens(load_texts(args.features_from), tokenizer, _SEQUENCE_LENGTH),
        tokenizer,
        features={name: sorted(numbers) for name, numbers in wanted.items()},
        max_tokens=args.max_tokens or 20_000,
        num_measured=3 if args.measured_contexts is None else args.measured_contexts,
        progress=not args.json,
    )


def _summary(graph, pruned, validation):
    from ..circuits.graphs.verdicts import graph_verdicts, left_out, notes

    return {
        "prompt": "".join(graph.tokens),
        "targets": [
            {"label": target.label, "probability": target.probability, "weight": target.weight}
            for target in graph.targets
        ],
        "nodes": graph.num_nodes,
        "edges": graph.num_edges,
        "largest_row_error": graph.metadata.get("largest_row_error"),
        "warning": graph.warning,
        "scores": graph.whole_scores,
        "verdicts": [verdict.to_dict() for verdict in graph_verdicts(pruned)],
        "notes": notes(pruned),
        "left_out": left_out(pruned),
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
    }


def _print(found, validation):
    echo("targets")
    for target in found["targets"]:
        share = "" if target["probability"] is None else f"{target['probability']:7.1%}"
        echo(f"  {share:>7}  {target['label']!r}")
    if found["warning"]:
        echo("", f"WARNING: {found['warning']}")
    for note in found["notes"]:
        echo("", note)
    scores = found["scores"]
    echo("", "verdict")
    for verdict in found["verdicts"]:
        echo(f"  {verdict['level']}  {verdict['text']}")
    echo(
        "",
        f"{found['nodes']:,} nodes, {found['edges']:,} edges: replacement {scores['replacement']:.3f}, completeness "
        f"{scores['completeness']:.3f}, {scores['rest']:.1%} of the influence not in the graph",
        found["left_out"],
    )
    if found["strongest"]:
        echo("", "strongest features")
        for feature in found["strongest"]:
            echo(f"  {feature['influence']:6.3f}  {feature['label']}, activation {feature['activation']:.3g}")
    if validation is not None:
        echo("", *validation.to_text().split("\n"))


def _slugs(prompts):
    """Names of files, one for each prompt."""
    slugs = []
    for prompt in prompts:
        slug = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:60].strip("-") or "graph"
        slugs.append(slug if slug not in slugs else f"{slug}-{len(slugs) + 1}")
    return slugs
