"""`hf-transcoders circuits`: which parts of a model do a task, and whether two tasks share them."""

import inspect

from ..errors import TranscoderError
from .common import add_model_arguments, load_base_model
from .terminal import HelpFormatter, Parser, echo, print_json, print_table
from .values import output_folder, seed, whole


_HEAD_COMPONENTS = ("z", "query", "key", "value", "pattern")
_SWEEPS = {"resid": "residual", "resid_mid": "residual", "mlp": "mlps", "attn": "attention"}


def parse(argv, prog):
    parser = Parser(
        prog=prog,
        description="Which heads, MLPs and points of the residual stream do a task, found by patching.",
        epilog="examples:\n"
        "  hf-transcoders circuits patch ioi --model smollm2-135m-instruct --component z --position END\n"
        "  hf-transcoders circuits patch ioi --model smollm2-135m-instruct --component resid --position S2,END\n"
        "  hf-transcoders circuits patch ioi --model smollm2-135m-instruct --receivers logits\n"
        "  hf-transcoders circuits reuse --model smollm2-135m-instruct --prompts 64",
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    actions = parser.add_subparsers(dest="action", required=True, metavar="{patch,reuse}")
    patch = actions.add_parser(
        "patch",
        help="what each head or point of a model does for a task: a heatmap and its numbers",
        formatter_class=HelpFormatter,
    )
    patch.add_argument("task", help="one of those that `tasks list` prints")
    add_model_arguments(patch, required=True)
    group = patch.add_argument_group("patching")
    group.add_argument(
        "--component",
        default="z",
        choices=[*_HEAD_COMPONENTS, *_SWEEPS],
        help="of a head: z (what it read), query, key, value, pattern; or the residual stream before a block (resid) "
        "or between its attention and MLP (resid_mid), the output of MLPs or of attention layers",
    )
    group.add_argument(
        "--per-query-head",
        action="store_true",
        help="with grouped queries: a key or value changes for one head, and not for the others that share it",
    )
    group.add_argument(
        "--position",
        default="END",
        help="name of a position of the task, or all; several, with commas, for resid, resid_mid, mlp and attn",
    )
    group.add_argument(
        "--receivers",
        help="patch the direct paths from heads to these instead: logits, or sites such as layers.8.attn.head.3.query, with "
        "commas",
    )
    group.add_argument("--direction", default="noising", choices=["noising", "denoising"], help="what goes where")
    group.add_argument(
        "--ablation",
        default="counterfactual",
        choices=["counterfactual", "zero", "mean", "resample"],
        help="what is written",
    )
    group.add_argument("--metric", help="left out, the task's own")
    group.add_argument("--corruption", help="what the corrupted prompt changes, for tasks with several")
    group.add_argument("--prompts", type=whole(1), default=64, help="prompts of the task")
    group.add_argument("--seed", type=seed, default=0, help="the same seed gives the same prompts")
    _add_output(patch, "runs/patch")

    reuse = actions.add_parser(
        "reuse",
        help="path-patch IOI and Colored Objects, compare their circuits, and repair Colored Objects",
        description="Merullo et al. (2024) on any model: heads of two tasks, their overlap against chance, and what forcing "
        "the attention of a few of them repairs. Takes minutes on a small model.",
        formatter_class=HelpFormatter,
    )
    add_model_arguments(reuse, required=True)
    group = reuse.add_argument_group("study")
    group.add_argument("--prompts", type=whole(1), default=64, help="prompts of each task for finding heads")
    group.add_argument("--repair-prompts", type=whole(1), default=200, help="other prompts, for the repair")
    group.add_argument(
        "--faithfulness-prompts",
        type=whole(0),
        default=32,
        help="prompts of each task for faithfulness; 0 leaves it out",
    )
    group.add_argument("--batch-size", type=whole(1), default=32, help="prompts of one forward")
    group.add_argument("--seed", type=seed, default=0, help="the same seed gives the same numbers")
    _add_output(reuse, "runs/reuse")
    return parser.parse_args(argv)


def _add_output(parser, folder):
    parser.add_argument(
        "--output", metavar="FOLDER", default=folder, help="report.html, results.json, CSV and PNG files go there"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args):
    output_folder(args.output)
    {"patch": _patch, "reuse": _reuse}[args.action](args)


def _patch(args):
    from ..circuits.patching.attention_views import attention_views
    from ..circuits.patching.patching import Patching
    from ..circuits.patching.report import save_patch

    make = _task_function(args)
    sweep = args.component in _SWEEPS
    positions = args.position.split(",")
    if len(positions) > 1 and (not sweep or args.receivers):
        raise TranscoderError("Heads are patched at one position at a time: give one --position.")
    if args.per_query_head and sweep:
        raise TranscoderError("--per-query-head is for keys and values of heads: leave it out.")
    if args.receivers and args.component != "z":
        raise TranscoderError("Paths lead from the outputs of heads to --receivers: leave out --component.")
    model, tokenizer = load_base_model(args.model, revision=args.revision, dtype=args.dtype, device=args.device)
    corruption = {} if args.corruption is None else {"corruption": args.corruption}
    task = make(tokenizer, size=args.prompts, seed=args.seed, **corruption)
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
    page = save_patch(result, args.output, views)
    if args.json:
        print_json({**result.to_dict(), "top": result.top(10), "report": str(page)})
        return
    echo(", ".join(f"{key} {value}" for key, value in result.protocol.items() if value is not None), "")
    rows = [[*(place[axis] for axis in result.axes), f"{place['effect']:+.4f}"] for place in result.top(10)]
    print_table([*result.axes, "effect"], rows, left=len(result.axes))
    echo("", page)


def _reuse(args):
    from ..studies.circuit_reuse.reuse_report import save_reuse
    from ..studies.circuit_reuse.study import reuse_circuit

    model, tokenizer = load_base_model(args.model, revision=args.revision, dtype=args.dtype, device=args.device)
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


def _task_function(args):
    from .. import tasks

    if args.task not in tasks.TASKS:
        raise TranscoderError(f"There is no task '{args.task}': choose from {', '.join(tasks.TASKS)}.")
    function = getattr(tasks, tasks.TASKS[args.task])
    if args.corruption is not None and "corruption" not in inspect.signature(function).parameters:
        raise TranscoderError(f"The task '{args.task}' has no --corruption: leave it out.")
    return function
