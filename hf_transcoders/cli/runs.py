"""`hf-transcoders runs`: list recorded runs, compare them, and draw their Pareto fronts."""

import os
from collections.abc import Sequence
from pathlib import Path

from ..errors import TranscoderError
from .arguments import output_arguments
from .terminal import Parser, echo, print_json, print_table
from .values import output_folder, unicode_text


# Arguments that always differ between runs and are not compared.
_OWN_TO_EACH = ("output_dir", "run_name", "logging_dir")


def parse(argv, prog):
    parser = Parser(
        prog=prog,
        description="Reads the records of runs, from their folders or from Trackio's local database.",
        epilog="examples:\n"
        "  hf-transcoders runs list runs\n"
        "  hf-transcoders runs compare runs/a runs/b\n"
        "  hf-transcoders runs pareto runs --output runs/fronts --csv\n"
        "  hf-transcoders runs list --trackio my_project",
    )
    actions = parser.add_subparsers(dest="action", required=True, metavar="{list,compare,pareto}")
    listing = _add(actions, "list", "*", "list runs, one per line", "Lists runs with their status and metrics.")
    compare = _add(actions, "compare", "+", "compare runs side by side", "Compares metrics and arguments of runs.")
    pareto = _add(
        actions,
        "pareto",
        "*",
        "draw Pareto fronts of sparsity and fidelity",
        "Draws the Pareto fronts of L0 against FVU and against CE recovered, over the dictionaries of all runs. Dictionaries "
        "measured in different ways (on other data, tokens or positions) have separate fronts.",
    )
    output_arguments(listing)
    output_arguments(compare)
    pareto.add_argument("--csv", action="store_true", help="also write the numbers as CSV")
    pareto.add_argument(
        "--title", type=unicode_text, default="Sparsity against fidelity", help="heading of the page and the picture"
    )
    pareto.add_argument(
        "--ce-recovered",
        choices=["zero", "mean"],
        default="zero",
        help="ablation that the CE recovered is measured against",
    )
    pareto.add_argument(
        "--allow-mixed",
        action="store_true",
        help="put numbers measured in different ways on one front; the page mentions it",
    )
    output_arguments(pareto, "pareto.html, pareto.png and pareto.csv", default="runs/pareto")
    return parser.parse_args(argv)


def _add(actions, name: str, nargs: str, text: str, description: str):
    parser = actions.add_parser(name, help=text, description=description)
    parser.add_argument(
        "runs",
        nargs=nargs,
        metavar="RUN",
        help="folder of a run, or a folder above several; with --trackio, the name of a run"
        + ("; by default, all of them" if nargs == "*" else ""),
    )
    parser.add_argument(
        "--trackio", metavar="PROJECT", help="read a project of Trackio's local database instead of folders"
    )
    return parser


def run(args):
    {"list": list_runs, "compare": compare_runs, "pareto": draw_fronts}[args.action](args)


# ------------------------------------------------------------------------------------------------ list


def list_runs(args):
    from ..evaluation.evaluation_report import METRICS

    runs = load_runs(args.runs, args.trackio)
    entries = [describe(run) for run in runs]
    if args.json:
        print_json(entries)
        return
    # The folder is shown if any differs from the name of its run.
    with_folder = any(run.folder is not None and run.folder.resolve().name != run.name for run in runs)
    head = ["name", *(["folder"] if with_folder else []), "status", "dictionaries", "tokens", "L0", "FVU"]
    head += [METRICS["ce_recovered_zero"], "measured in", "last record"]
    rows = [
        [
            entry["name"],
            *([_relative(entry["folder"])] if with_folder else []),
            entry["status"],
            str(len(entry["dictionaries"])),
            f"{entry['tokens']:,}" if entry["tokens"] else "-",
            *(
                _range([d["metrics"].get(m) for d in entry["dictionaries"]])
                for m in ("l0", "fvu", "ce_recovered_zero")
            ),
            ", ".join(sorted({d["source"] for d in entry["dictionaries"]})) or "-",
            run.last_word.astimezone().strftime("%Y-%m-%d %H:%M") if run.last_word else "-",
        ]
        for entry, run in zip(entries, runs, strict=True)
    ]
    print_table(head, rows, left=3 if with_folder else 2)
    _print_problems(entries)


def describe(run) -> dict:
    """Return facts and metrics of a run as JSON values."""
    measured = run.measured()
    tokens = run.latest().get("train/tokens")
    return {
        "name": run.name,
        "folder": str(run.folder) if run.folder else None,
        "status": run.status,
        "base_model": run.facts.get("base_model"),
        "started": run.facts.get("started"),
        "last_word": run.last_word.isoformat() if run.last_word else None,
        "tokens": int(tokens) if tokens else None,
        "dictionaries": [
            {"name": d.name, "source": d.source, "step": d.step, "metrics": d.metrics, "config": d.config}
            for d in measured
        ],
        "alerts": len(run.alerts),
        "problems": run.problems,
    }


def _print_problems(entries) -> None:
    lines = [f"{entry['name']}: {problem}" for entry in entries for problem in entry["problems"]]
    if lines:
        echo("", *lines)


def _range(values: Sequence[float | None]) -> str:
    from ..evaluation.evaluation_report import format_number

    known = [value for value in values if value is not None]
    if not known:
        return "-"
    low, high = format_number(min(known)), format_number(max(known))
    return low if low == high else f"{low} to {high}"


def _relative(folder: str | None) -> str:
    return os.path.relpath(folder) if folder else "-"


# ------------------------------------------------------------------------------------------------ compare


def compare_runs(args):
    from ..evaluation.evaluation_report import METRICS, format_number
    from ..reports.pareto.fronts import protocol_differences

    runs = [run for name in args.runs for run in load_runs([name], args.trackio)]
    if len(runs) < 2:
        raise TranscoderError("There is only one run: give two or more to compare.")
    entries = [describe(run) for run in runs]
    names = _headings(runs)
    tables = _side_by_side(entries)
    arguments = _differences([run.facts.get("arguments") for run in runs], leave_out=_OWN_TO_EACH)
    measured = [dictionary for run in runs for dictionary in run.measured()]
    protocols = protocol_differences([dictionary.protocol for dictionary in measured])
    if args.json:
        compared = {
            dictionary: {metric: dict(zip(names, values, strict=True)) for metric, values in table.items()}
            for dictionary, table in tables.items()
        }
        differing = {name: dict(zip(names, values, strict=True)) for name, values in arguments.items()}
        print_json({"runs": entries, "metrics": compared, "arguments": differing, "protocols": protocols})
        return
    print_table(
        ["", *names],
        [
            ["status", *(entry["status"] for entry in entries)],
            ["tokens", *(f"{entry['tokens']:,}" if entry["tokens"] else "-" for entry in entries)],
            ["base model", *(entry["base_model"] or "-" for entry in entries)],
        ],
    )
    for dictionary, table in tables.items():
        echo("", dictionary)
        rows = [
            [METRICS.get(metric, metric), *(v if isinstance(v, str) else format_number(v) for v in values)]
            for metric, values in table.items()
        ]
        print_table(["metric", *names], rows)
    echo("", "different arguments" if arguments else "No recorded argument differs.")
    if arguments:
        print_table(["argument", *names], [[name, *map(_text, values)] for name, values in arguments.items()])
    if protocols:
        facts = ", ".join(f"{fact} ({' / '.join(map(str, values))})" for fact, values in protocols.items())
        echo("", f"The numbers were measured in different ways: {facts}.", error=True)
    _print_problems(entries)


def _headings(runs) -> list[str]:
    """Return the names of runs, with their folders if names repeat."""
    names = [run.name for run in runs]
    if len(set(names)) == len(names):
        return names
    return [f"{run.name} ({_relative(str(run.folder))})" if run.folder else run.name for run in runs]


def _side_by_side(entries) -> dict[str, dict[str, list]]:
    """Dictionary -> metric -> value of each run. If each run has one dictionary, these are compared."""
    from ..evaluation.evaluation_report import METRICS

    by_name = [{d["name"]: d for d in entry["dictionaries"]} for entry in entries]
    if all(len(found) == 1 for found in by_name):
        titles = list(dict.fromkeys(name for found in by_name for name in found))
        by_name = [{" / ".join(titles): next(iter(found.values()))} for found in by_name]
    tables = {}
    for name in dict.fromkeys(name for found in by_name for name in found):
        columns = [found.get(name) for found in by_name]
        known = {metric for column in columns if column for metric in column["metrics"]}
        table = {"measured in": [column["source"] if column else "-" for column in columns]}
        for metric in (*(m for m in METRICS if m in known), *sorted(known - METRICS.keys())):
            table[metric] = [column["metrics"].get(metric) if column else None for column in columns]
        tables[name] = table
    return tables


def _differences(values: Sequence[dict | None], leave_out: Sequence[str]) -> dict[str, list]:
    known = [value if isinstance(value, dict) else {} for value in values]
    names = dict.fromkeys(name for value in known for name in value if name not in leave_out)
    columns = {name: [value.get(name) for value in known] for name in names}
    return {name: column for name, column in columns.items() if any(value != column[0] for value in column)}


def _text(value) -> str:
    return "-" if value is None else str(value)


# ------------------------------------------------------------------------------------------------ pareto


def draw_fronts(args):
    from ..reports.pareto.caveats import warning
    from ..reports.pareto.fronts import pareto_fronts
    from ..reports.pareto.write import write_pareto

    output = output_folder(args.output)
    runs = load_runs(args.runs, args.trackio)
    measured = {id(run): run.measured() for run in runs}
    notes = [
        f"Left out: {run.name} ({run.status}), which has no metrics of a dictionary."
        for run in runs
        if not measured[id(run)]
    ]
    fronts = pareto_fronts(
        [dictionary for run in runs for dictionary in measured[id(run)]],
        ablation=args.ce_recovered,
        allow_mixed=args.allow_mixed,
    )
    files = write_pareto(output / "pareto", fronts, title=args.title, notes=notes, csv=args.csv)
    report_fronts(fronts, files, as_json=args.json, notes=[*filter(None, [warning(fronts)]), *notes])


def report_fronts(fronts, files: Sequence[Path], as_json: bool, notes: Sequence[str]) -> None:
    """Print fronts, notes about them, and the files that were written."""
    if as_json:
        print_json({"files": [str(file) for file in files], "notes": notes, "fronts": fronts_as_values(fronts)})
        return
    print_fronts(fronts)
    echo()
    for note in notes:
        echo(note, error=True)
    if not any(file.suffix == ".png" for file in files):
        echo(
            'No PNG was written, since matplotlib is not installed: `pip install "hf_transcoders[plots]"`.', error=True
        )
    echo(*(file.resolve() for file in files))


def fronts_as_values(fronts) -> list[dict]:
    return [
        {
            "protocol": group.protocol,
            "differences": group.differences,
            "dictionaries": [
                {
                    "run": d.run, "name": d.name, "source": d.source, "step": d.step, "config": d.config,
                    "metrics": d.metrics, "on_front": {metric: front[i] for metric, front in group.on_front.items()},
                }
                for i, d in enumerate(group.dictionaries)
            ],
        }
        for group in fronts
    ]  # fmt: skip


def print_fronts(fronts) -> None:
    from ..evaluation.evaluation_report import METRICS, format_number
    from ..reports.pareto.caveats import heading

    for group in fronts:
        if len(fronts) > 1:
            echo("", heading(group))
        metrics = ["l0", *group.on_front]
        several = len({d.run for d in group.dictionaries}) > 1
        rows = [
            [
                d.name,
                *([d.run] if several else []),
                group.standing(i),
                *(format_number(d.metrics.get(metric)) for metric in metrics),
            ]
            for i, d in enumerate(group.dictionaries)
        ]
        head = ["dictionary", *(["run"] if several else []), "standing", *(METRICS[metric] for metric in metrics)]
        print_table(head, rows, left=3 if several else 2)


# ------------------------------------------------------------------------------------------------ where runs are


def load_runs(names: Sequence[str], trackio_project: str | None = None) -> list:
    """
    Load the runs that the command line names.

    Args:
        names (`Sequence[str]`): Folders of runs or above them, or names of runs with `trackio_project`. If empty, all runs.
        trackio_project (`str`, *optional*): Project of Trackio's local database to read.

    Returns:
        `list[Run]`
    """
    from ..tracking.run import find_runs
    from ..tracking.trackio_runs import trackio_run, trackio_runs

    if trackio_project is not None:
        runs = [trackio_run(trackio_project, name) for name in names] or list(trackio_runs(trackio_project))
        if not runs:
            raise TranscoderError(f"Trackio's project '{trackio_project}' has no runs.")
        return runs
    runs = {}
    for name in names or ["."]:
        if not Path(name).is_dir():
            raise TranscoderError(
                f"There is no folder {name}: give the output folder of a run, or a folder above several."
            )
        found = list(find_runs(name))
        if not found:
            where = "the current folder" if name == "." else name
            raise TranscoderError(
                f"There is no recorded run in {where} (no tracking/run.json in or below it): give the output folder of a "
                "run, a folder above several, or --trackio PROJECT."
            )
        runs |= {run.folder.resolve(): run for run in found}
    return list(runs.values())
