"""`hf-transcoders circuits`: the components of a model that implement a task, and whether two tasks share them."""

from ..errors import TranscoderError
from .arguments import add_shared, model_arguments, output_arguments, task_arguments
from .common import load_model
from .tasks import task_maker
from .terminal import Parser, echo, print_json, print_table
from .values import LibraryNames, output_folder, whole


_HEAD_COMPONENTS = ("z", "query", "key", "value", "pattern")
_SWEEPS = {"resid": "residual", "resid_mid": "residual", "mlp": "mlps", "attn": "attention"}


def parse(argv, prog):
    parser = Parser(
        prog=prog,
        description="Finds the heads, MLPs and residual stream points that implement a task, by activation patching.",
        epilog="examples:\n"
        "  hf-transcoders circuits patch ioi --model smollm2-135m-instruct --component z --position END\n"
        "  hf-transcoders circuits patch ioi --model smollm2-135m-instruct --component resid --position S2,END\n"
        "  hf-transcoders circuits patch ioi --model smollm2-135m-instruct --receivers logits\n"
        "  hf-transcoders circuits reuse --model smollm2-135m-instruct --prompts 64",
    )
    actions = parser.add_subparsers(dest="action", required=True, metavar="{patch,reuse}")
    patch = actions.add_parser("patch", help="the effect of each head or point of a model on a task, as a heatmap")
    task_arguments(patch, prompts=64)
    model_arguments(patch, required=True)
    group = patch.add_argument_group("patching")
    group.add_argument(
        "--component",
        default="z",
        choices=[*_HEAD_COMPONENTS, *_SWEEPS],
        help="component to patch: the attention-weighted values (z), query, key, value or pattern of each head; the residual "
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
        choices=["noising", "denoising"],
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
    add_shared(group, "batch_size", default=32)
    add_shared(group, "seed", "the same seed gives the same numbers", default=0)
    output_arguments(reuse, "report.html, results.json, CSV and PNG files", default="runs/reuse")
    return parser.parse_args(argv)


def run(args):
    output_folder(args.output)
    {"patch": _patch, "reuse": _reuse}[args.action](args)


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
        seed=args.seed,
        batch_size=args.batch_size,
        progress=not args.json,
    )
    page = save_reuse(result, args.output)
    if args.json:
        print_json({**result.to_dict(), "report": str(page)})
    else:
        echo(*result.to_text().split("\n"), "", page)
