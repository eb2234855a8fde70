"""`hf-transcoders circuits`: the components of a model that implement a task, and whether two tasks share them."""

from ..errors import TranscoderError
from .arguments import add_shared, model_arguments, output_arguments, task_arguments
from .common import finish, load_model
from .outline import LibraryNames
from .tasks import task_maker
from .terminal import Parser, echo, print_json, print_table
from .values import not_negative, output_folder, whole


_SWEEPS = {"resid": "residual", "resid_mid": "residual", "mlp": "mlps", "attn": "attention"}


def parse(argv, prog):
    parser = Parser(
        prog=prog,
        description="Finds the heads, MLPs and residual stream points that implement a task, by activation patching.",
        epilog="examples:\n"
        "  hf-transcoders circuits patch ioi --model smollm2-135m-instruct --component z --position END\n"
        "  hf-transcoders circuits patch ioi --model smollm2-135m-instruct --component resid --position S2,END\n"
        "  hf-transcoders circuits patch ioi --model smollm2-135m-instruct --receivers logits\n"
        "  hf-transcoders circuits reuse --model smollm2-135m-instruct --prompts 64\n"
        "  hf-transcoders circuits repair colored-objects --model smollm2-135m-instruct --tokens wrong_colour",
    )
    actions = parser.add_subparsers(dest="action", required=True, metavar="{patch,reuse,repair}")
    patch = actions.add_parser("patch", help="the effect of each head or point of a model on a task, as a heatmap")
    task_arguments(patch, prompts=64)
    model_arguments(patch, required=True)
    group = patch.add_argument_group("patching")
    group.add_argument(
        "--component",
        default="z",
        metavar="NAME",
        choices=LibraryNames("..lm.sites", "HEAD_POINTS", *_SWEEPS),
        help="component to patch, one of %(choices)s: the attention-weighted values (z), query, key, value or pattern of each head; the residual "
        "stream before each block (resid) or between its attention and MLP (resid_mid); or the output of each MLP or attention "
        "layer",
    )
    group.add_argument(
        "--per-query-head",
        action="store_true",
        help="with grouped queries: patch a key or value for one query head, not for all heads that share it",
    )
    group.add_argument(
        "--position",
        metavar="NAME",
        default="END",
        help="named position of the task, or all; several, separated by commas, for resid, resid_mid, mlp and attn",
    )
    group.add_argument(
        "--receivers",
        metavar="SITES",
        help="patch the direct paths from heads to these receivers instead: logits, or sites such as "
        "layers.8.attn.head.3.query, separated by commas",
    )
    group.add_argument(
        "--direction",
        default="noising",
        metavar="NAME",
        choices=LibraryNames("..circuits.patching.engine", "Direction"),
        help="noising: corrupted activations into the clean run; denoising: clean activations into the corrupted run",
    )
    group.add_argument(
        "--ablation",
        default="counterfactual",
        metavar="NAME",
        choices=LibraryNames("..circuits.patching.ablations", "ABLATIONS"),
        help="value to patch in: %(choices)s",
    )
    group.add_argument("--metric", metavar="NAME", help="metric of the effect; by default, the metric of the task")
    output_arguments(patch, "report.html, results.json, CSV and PNG files", default="runs/patch")

    reuse = actions.add_parser(
        "reuse",
        help="path-patch IOI and Colored Objects, compare their circuits, and repair Colored Objects",
        description="Merullo et al. (2024) on any model: the heads of two tasks, their overlap against chance, and what "
        "editing the attention of a few heads repairs. Takes minutes on a small model.",
    )
    model_arguments(reuse, required=True)
    group = reuse.add_argument_group("study")
    add_shared(group, "prompts", "per task, for finding heads", default=64)
    group.add_argument(
        "--repair-prompts", type=whole(1), metavar="N", default=200, help="number of other prompts, for the repair"
    )
    group.add_argument(
        "--faithfulness-prompts",
        type=whole(0),
        metavar="N",
        default=32,
        help="number of prompts of each task for measuring faithfulness; 0 skips it",
    )
    group.add_argument(
        "--search-prompts",
        type=whole(0),
        metavar="N",
        default=64,
        help="number of prompts on which heads for the repair are searched, among all heads; 0 skips the search",
    )
    add_shared(group, "batch_size", default=32)
    add_shared(group, "seed", "the same seed gives the same numbers", default=0)
    output_arguments(reuse, "report.html, results.json, CSV and PNG files", default="runs/reuse")
    _repair_arguments(actions)
    return parser.parse_args(argv)


def _repair_arguments(actions):
    repair = actions.add_parser(
        "repair",
        help="search for heads that repair a task when their attention is forced onto other tokens",
        description="Forces the attention of every head onto sets of named tokens, alone and together, keeps the heads that fix "
        "the most prompts, judges them on prompts of another seed, compares them with controls, and describes the roles of these heads without the edit.",
    )
    task_arguments(repair, prompts=64)
    model_arguments(repair, required=True)
    group = repair.add_argument_group("search")
    group.add_argument(
        "--judge-prompts",
        type=whole(1),
        metavar="N",
        default=128,
        help="number of prompts of the next seed, for judging",
    )
    group.add_argument(
        "--tokens",
        metavar="NAMES",
        help="sets of tokens to force attention onto, separated by commas: named positions of the task, such as question_object; "
        "names without their numbers, such as wrong_colour for wrong_colour_1 and wrong_colour_2; or 'first token'. By default "
        "all of them",
    )
    group.add_argument(
        "--query", metavar="NAME", default="END", help="named position of the task from which attention is forced"
    )
    group.add_argument(
        "--search-layers",
        type=whole(0),
        metavar="N",
        nargs="+",
        help="layers to search; by default, from a quarter of the depth up",
    )
    group.add_argument(
        "--objective",
        default="accuracy",
        metavar="NAME",
        choices=LibraryNames("..studies.circuit_reuse.repair_search", "OBJECTIVES"),
        help="metric to raise, one of %(choices)s: in the full vocabulary, or among the candidates",
    )
    group.add_argument(
        "--penalty",
        type=not_negative,
        metavar="X",
        default=1.0,
        help="what a new mistake costs, in prompts, besides its share of the accuracy",
    )
    group.add_argument(
        "--max-heads", type=whole(1), metavar="N", default=4, help="largest number of heads in a repair"
    )
    group.add_argument(
        "--shortlist",
        type=whole(1),
        metavar="N",
        default=32,
        help="heads of each set that are tried after the first step",
    )
    group.add_argument(
        "--beam",
        type=whole(1),
        metavar="N",
        default=3,
        help="combinations that are kept in each step; 1 is a greedy search",
    )
    group.add_argument(
        "--explained",
        type=whole(0),
        metavar="N",
        default=3,
        help="number of repairs that are compared with controls and explained",
    )
    group.add_argument(
        "--role-prompts",
        type=whole(0),
        metavar="N",
        default=32,
        help="number of prompts of IOI and Colored Objects for the roles of the heads found; 0 skips the roles",
    )
    output_arguments(repair, "report.html, results.json, CSV and PNG files", default="runs/repair")


def run(args):
    output_folder(args.output)
    {"patch": _patch, "reuse": _reuse, "repair": _repair}[args.action](args)


def _patch(args):
    from ..circuits.patching.attention_views import attention_views
    from ..circuits.patching.patching import Patching
    from ..circuits.patching.report import run_rows, save_patch
    from ..reports.sections import fact_text
    from ..tasks.performance import task_performance

    make = task_maker(args)
    sweep = args.component in _SWEEPS
    positions = args.position.split(",")
    if len(positions) > 1 and (not sweep or args.receivers):
        raise TranscoderError("Heads are patched at one position at a time: give a single --position.")
    if args.per_query_head and sweep:
        raise TranscoderError("--per-query-head applies to keys and values of heads: leave it out.")
    if args.receivers and args.component != "z":
        raise TranscoderError("Paths start at the outputs of heads (z): leave out --component, or --receivers.")
    model, tokenizer = load_model(args.model, revision=args.revision, dtype=args.dtype, device=args.device)
    task = make(tokenizer)
    patching = Patching(
        model,
        task,
        direction=args.direction,
        ablation=args.ablation,
        metric=args.metric,
        seed=args.seed if args.ablation == "resample" else None,
        progress=not args.json,
    )
    if args.receivers:
        result = patching.paths(args.receivers.split(","), args.position, per_query_head=args.per_query_head)
    elif sweep:
        point = {"point": "resid_mid"} if args.component == "resid_mid" else {}
        result = getattr(patching, _SWEEPS[args.component])(positions, **point)
    else:
        result = patching.heads(args.position, args.component, per_query_head=args.per_query_head)
    views = []
    if not sweep and (args.per_query_head or args.component not in ("key", "value")):
        strongest = result.top(1)[0]
        head = (int(strongest["layer"]), int(strongest["head"]))
        views = attention_views(model, tokenizer, task, {head: "greatest effect:"})
    performance = task_performance(model, task)
    page = save_patch(result, args.output, views, performance)
    if args.json:
        print_json(
            {**result.to_dict(), "performance": performance.to_dict(), "top": result.top(10), "report": str(page)}
        )
        return
    print_table(performance.headings(), performance.rows())
    echo()
    print_table(["patched runs", result.metric.replace("_", " ")], run_rows(result))
    for warning in filter(None, [performance.warning, result.warning]):
        echo("", f"WARNING: {warning}")
    echo("", fact_text(result.protocol), "")
    rows = [[*(place[axis] for axis in result.axes), f"{place['effect']:+.4f}"] for place in result.top(10)]
    print_table([*result.axes, "effect"], rows, left=len(result.axes))
    echo("", page)


def _reuse(args):
    from ..studies.circuit_reuse.reuse_report import save_reuse
    from ..studies.circuit_reuse.study import reuse_circuit

    model, tokenizer = load_model(args.model, revision=args.revision, dtype=args.dtype, device=args.device)
    result = reuse_circuit(
        model,
        tokenizer,
        prompts=args.prompts,
        repair_prompts=args.repair_prompts,
        faithfulness_prompts=args.faithfulness_prompts,
        search_prompts=args.search_prompts,
        seed=args.seed,
        batch_size=args.batch_size,
        progress=not args.json,
    )
    finish(args, result, save_reuse(result, args.output))


def _repair(args):
    from ..studies.circuit_reuse.forced_heads import choose_sets
    from ..studies.circuit_reuse.found_repair import find_repair
    from ..studies.circuit_reuse.repair_report import save_repair
    from ..studies.circuit_reuse.traced_tasks import trace_tasks

    make = task_maker(args)
    model, tokenizer = load_model(args.model, revision=args.revision, dtype=args.dtype, device=args.device)
    task = make(tokenizer)
    tokens = None if args.tokens is None else choose_sets(task, args.tokens.split(","), args.query)
    traced = None
    if args.role_prompts:
        traced = trace_tasks(model, tokenizer, args.role_prompts, depth=2, seed=args.seed, progress=not args.json)
    study = find_repair(
        model,
        task,
        make(tokenizer, size=args.judge_prompts, seed=args.seed + 1),
        query=args.query,
        tokens=tokens,
        layers=args.search_layers,
        objective=args.objective,
        penalty=args.penalty,
        max_heads=args.max_heads,
        shortlist=args.shortlist,
        beam=args.beam,
        explained=args.explained,
        traced=traced,
        seed=args.seed,
        progress=not args.json,
    )
    finish(args, study, save_repair(study, args.output))
