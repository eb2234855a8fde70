"""`hf-transcoders tasks`: list tasks, show their prompts for a tokenizer, and measure how well a model does them."""

import argparse
import functools
import inspect

from ..errors import TranscoderError
from ..text.printable import printable
from .arguments import add_shared, model_arguments, output_arguments, task_arguments
from .common import load_model, load_tokenizer
from .terminal import Parser, echo, print_json, print_table
from .values import inner_share, output_folder


# Options of some tasks only.
_TASK_OPTIONS = ("corruption", "templates", "structure")
_HEADINGS = {
    "accuracy": "accuracy, full vocabulary",
    "candidate_accuracy": "accuracy among candidates",
    "rank": "mean rank of the answer",
    "logit_difference": "logit difference",
    "probability_difference": "probability difference",
    "kl": "KL from clean, nats",
}


def parse(argv, prog):
    parser = Parser(
        prog=prog,
        description="Tasks for circuits: pairs of a clean and a corrupted prompt, with answers and named positions, for any "
        "tokenizer.",
        epilog="examples:\n"
        "  hf-transcoders tasks list\n"
        "  hf-transcoders tasks show ioi --model smollm2-135m-instruct --corruption s2_io_flip\n"
        "  hf-transcoders tasks measure colored-objects --model smollm2-135m-instruct --prompts 500",
    )
    actions = parser.add_subparsers(dest="action", required=True, metavar="{list,show,measure}")
    output_arguments(actions.add_parser("list", help="list the tasks and their options"))
    show = actions.add_parser("show", help="print prompts with their positions and answers")
    _task_arguments(show, prompts=3)
    add_shared(show, "model", "only its tokenizer is loaded", required=True)
    add_shared(show, "revision")
    output_arguments(show, "the task as Parquet and JSON; by default, nothing is written")
    measured = actions.add_parser("measure", help="measure how well a model does a task")
    _task_arguments(measured, prompts=200)
    model_arguments(measured, required=True)
    group = measured.add_argument_group("measuring")
    add_shared(group, "batch_size", default=32)
    group.add_argument(
        "--confidence", type=inner_share, metavar="SHARE", default=0.95, help="confidence level of the intervals"
    )
    output_arguments(measured)
    return parser.parse_args(argv)


def _task_arguments(parser, prompts):
    task_arguments(parser, prompts)
    group = parser.add_argument_group("options of some tasks")
    group.add_argument("--templates", help="templates of ioi: baba, abba or both")
    group.add_argument("--structure", help="kind of sentence of subject-verb-agreement")
    group.add_argument("--split", help="train, validation or test split of the task; by default, all prompts")
    add_shared(group, "add_bos", action=argparse.BooleanOptionalAction)


def task_maker(args):
    """Return a function that makes the chosen task for a tokenizer, after checking the options of the task."""
    function = _function(args)
    options = {"size": args.prompts, "seed": args.seed}
    for name in (*_TASK_OPTIONS, "split", "add_bos"):
        value = getattr(args, name, None)
        if value is None:
            continue
        if name not in _options(function):
            raise TranscoderError(f"The task '{args.task}' has no --{name}: leave it out.")
        options[name] = value
    return functools.partial(function, **options)


def run(args):
    {"list": _list, "show": _show, "measure": _measure}[args.action](args)


def _list(args):
    functions = _functions()
    if args.json:
        print_json(
            [
                {"name": name, "options": [option for option in _TASK_OPTIONS if option in _options(function)]}
                for name, function in functions.items()
            ]
        )
        return
    width = max(map(len, functions)) + 2
    for name, function in functions.items():
        module = inspect.getmodule(function)
        echo(f"{name:<{width}}{module.__doc__.strip().splitlines()[0]}")
        for option in _TASK_OPTIONS:
            if option in _options(function):
                echo(f"{'':<{width}}  --{option} (default {_options(function)[option].default})")


def _show(args):
    from ..reports.sections import fact_text

    make = task_maker(args)
    if args.output:
        output_folder(args.output)
    tokenizer = load_tokenizer(args.model, args.revision)
    task = make(tokenizer)
    if args.output:
        task.save(args.output)
    if args.json:
        print_json(
            {
                "name": task.name,
                "description": task.description,
                "metric": task.metric,
                "settings": task.settings,
                "rows": [task[row] | _texts(task[row], tokenizer) for row in range(len(task))],
            }
        )
        return
    echo(task.description, fact_text(task.settings))
    for number in range(len(task)):
        row = task[number]
        echo("", f"row {number}, template {row['template']}, {len(row['clean_ids'])} tokens")
        for which in ("clean", "corrupted"):
            echo(f"  {which:<10}{_marked(row[f'{which}_ids'], row['positions'], tokenizer)}")
        texts = _texts(row, tokenizer)
        for name, label in (("answers", "right"), ("wrong_answers", "wrong"), ("candidates", "among")):
            echo(f"  {label:<10}{' '.join(map(repr, texts[name]))}")


def _measure(args):
    from ..reports.sections import fact_text
    from ..tasks.performance import task_performance

    make = task_maker(args)
    model, tokenizer = load_model(args.model, revision=args.revision, dtype=args.dtype, device=args.device)
    task = make(tokenizer)
    performance = task_performance(model, task, args.batch_size, args.confidence, args.seed, progress=not args.json)
    result, warning = performance.measured, performance.warning
    protocol = {
        "task": task.name,
        "model": model.config.name_or_path,
        "dtype": str(model.dtype).removeprefix("torch."),
        "metric": task.metric,
        **task.settings,
    }
    if args.json:
        figures = {which: {name: e.to_dict() for name, e in metrics.items()} for which, metrics in result.items()}
        print_json({"protocol": protocol, "warning": warning, **figures})
        return
    echo(task.description, fact_text(protocol), "")
    rows = [
        [heading, *(metrics.get(name, "-") for metrics in result.values())]
        for name, heading in _HEADINGS.items()
        if any(name in metrics for metrics in result.values())
    ]
    print_table(["", *result], rows, left=1 + len(result))
    echo("", f"{args.confidence:.0%} intervals: Wilson for accuracies, bootstrap for other metrics.")
    if warning:
        echo("", f"WARNING: {warning}")


def _functions():
    from .. import tasks

    return {name: getattr(tasks, function) for name, function in tasks.TASKS.items()}


def _function(args):
    functions = _functions()
    if args.task not in functions:
        raise TranscoderError(f"There is no task '{args.task}': choose from {', '.join(functions)}.")
    return functions[args.task]


def _options(function):
    return inspect.signature(function).parameters


def _texts(row, tokenizer):
    """Return the answers of a row as text."""
    from ..data.token_texts import token_texts

    columns = {"answers": "answer_ids", "wrong_answers": "wrong_ids", "candidates": "candidate_ids"}
    return {name: token_texts(tokenizer, row[column]) for name, column in columns.items()}


def _marked(ids, positions, tokenizer):
    """Format a prompt on one line, with named tokens as `[name: token]`."""
    from ..data.token_texts import token_texts

    names = {}
    for name, position in positions.items():
        names.setdefault(position, []).append(name)
    text = ""
    for index, token in enumerate(map(printable, token_texts(tokenizer, ids))):
        text += f"[{'/'.join(names[index])}:{token}]" if index in names else token
    return text
