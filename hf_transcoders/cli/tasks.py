"""`hf-transcoders tasks`: which tasks there are, what a tokenizer makes of them, how well a model does them."""

import argparse
import inspect

from ..errors import TranscoderError
from ..text.printable import printable
from .common import add_model_arguments, load_base_model, load_tokenizer
from .terminal import HelpFormatter, Parser, echo, print_json, print_table
from .values import inner_share, output_folder, seed, whole


# Options that only some tasks have.
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
        description="Prompts for circuits: pairs of a clean and a corrupted one, with answers and named positions, for any "
        "tokenizer.",
        epilog="examples:\n"
        "  hf-transcoders tasks list\n"
        "  hf-transcoders tasks show ioi --model smollm2-135m-instruct --corruption s2_io_flip\n"
        "  hf-transcoders tasks measure colored-objects --model smollm2-135m-instruct --size 500",
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    actions = parser.add_subparsers(dest="action", required=True, metavar="{list,show,measure}")
    listing = actions.add_parser("list", help="the tasks", formatter_class=HelpFormatter)
    listing.add_argument("--json", action="store_true", help="print JSON")
    show = actions.add_parser(
        "show", help="some prompts with their positions and answers", formatter_class=HelpFormatter
    )
    show.add_argument("task", help="one of those that `tasks list` prints")
    show.add_argument("--model", required=True, help="Hub id, folder or packaged model; only its tokenizer is used")
    show.add_argument("--revision", help="commit, tag or branch of the model on the Hub")
    show.add_argument("--size", type=whole(1), default=3, help="prompts to show")
    show.add_argument("--output", metavar="FOLDER", help="write the task there as Parquet and JSON")
    _add_task_arguments(show)
    measured = actions.add_parser("measure", help="accuracy and differences of a model", formatter_class=HelpFormatter)
    measured.add_argument("task", help="one of those that `tasks list` prints")
    add_model_arguments(measured, required=True)
    measured.add_argument("--size", type=whole(1), default=200, help="prompts to measure")
    measured.add_argument("--batch-size", type=whole(1), default=32, help="rows of one forward")
    measured.add_argument("--confidence", type=inner_share, default=0.95, help="of the intervals")
    _add_task_arguments(measured)
    return parser.parse_args(argv)


def _add_task_arguments(parser):
    group = parser.add_argument_group("task")
    group.add_argument("--corruption", help="what the corrupted prompt changes, for tasks with several")
    group.add_argument("--templates", help="baba, abba or both, for ioi")
    group.add_argument("--structure", help="kind of sentence, for subject-verb-agreement")
    group.add_argument("--seed", type=seed, default=0, help="the same seed gives the same prompts")
    group.add_argument("--split", help="train, validation or test; left out, everything")
    group.add_argument(
        "--bos",
        action=argparse.BooleanOptionalAction,
        default=argparse.SUPPRESS,
        help="begin prompts with the beginning-of-sequence token, or not; left out, as the tokenizer does",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


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
    function = _function(args)
    if args.output:
        output_folder(args.output)
    tokenizer = load_tokenizer(args.model, args.revision)
    task = function(tokenizer, **_chosen(args, function))
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
    echo(task.description, _line(task.settings))
    for number in range(len(task)):
        row = task[number]
        echo("", f"row {number}, template {row['template']}, {len(row['clean_ids'])} tokens")
        for which in ("clean", "corrupted"):
            echo(f"  {which:<10}{_marked(row[f'{which}_ids'], row['positions'], tokenizer)}")
        texts = _texts(row, tokenizer)
        for name, label in (("answers", "right"), ("wrong_answers", "wrong"), ("candidates", "among")):
            echo(f"  {label:<10}{' '.join(map(repr, texts[name]))}")


def _measure(args):
    from ..tasks.measuring import measure

    function = _function(args)
    model, tokenizer = load_base_model(args.model, revision=args.revision, dtype=args.dtype, device=args.device)
    task = function(tokenizer, **_chosen(args, function))
    result = measure(model, task, args.batch_size, confidence=args.confidence, seed=args.seed, progress=not args.json)
    protocol = {
        "task": task.name,
        "model": model.config.name_or_path,
        "dtype": str(model.dtype).removeprefix("torch."),
        "metric": task.metric,
        **task.settings,
    }
    if args.json:
        figures = {which: {name: e.to_dict() for name, e in metrics.items()} for which, metrics in result.items()}
        print_json({"protocol": protocol, **figures})
        return
    echo(task.description, _line(protocol), "")
    rows = [
        [heading, *(metrics.get(name, "-") for metrics in result.values())]
        for name, heading in _HEADINGS.items()
        if any(name in metrics for metrics in result.values())
    ]
    print_table(["", *result], rows, left=1 + len(result))
    echo("", f"Intervals of {args.confidence:.0%}: Wilson for accuracies, bootstrap for the rest.")


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


def _chosen(args, function):
    """The arguments for the task; an option that it does not have is a mistake."""
    chosen = {"size": args.size, "seed": args.seed, "split": args.split, "add_bos": getattr(args, "bos", None)}
    for option in _TASK_OPTIONS:
        value = getattr(args, option)
        if value is None:
            continue
        if option not in _options(function):
            raise TranscoderError(f"The task '{args.task}' has no --{option}: leave it out.")
        chosen[option] = value
    return chosen


def _texts(row, tokenizer):
    """The answers of a row as text."""
    from ..data.token_texts import token_texts

    columns = {"answers": "answer_ids", "wrong_answers": "wrong_ids", "candidates": "candidate_ids"}
    return {name: token_texts(tokenizer, row[column]) for name, column in columns.items()}


def _marked(ids, positions, tokenizer):
    """The prompt on one line, with named tokens as `[name: token]`."""
    from ..data.token_texts import token_texts

    names = {}
    for name, position in positions.items():
        names.setdefault(position, []).append(name)
    text = ""
    for index, token in enumerate(map(printable, token_texts(tokenizer, ids))):
        text += f"[{'/'.join(names[index])}:{token}]" if index in names else token
    return text


def _line(settings):
    return ", ".join(f"{key} {value}" for key, value in settings.items() if value is not None)
