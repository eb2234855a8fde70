"""Folders of results: a page, pictures, and every number as JSON and CSV."""

import os
from importlib.util import find_spec
from pathlib import Path

from ...circuits.patching.results import PatchResult
from ...files import write_csv, write_text
from ...reports.heatmap import AttentionView, Heatmap, Section, Table, write_page, write_png
from ...text.columns import aligned
from ...text.printable import printable
from ...text.strict_json import to_json
from .roles import ROLES
from .study import CircuitReuse


_TITLES = {"ioi": "IOI", "colored-objects": "Colored Objects"}
_CONTROLS = {
    "random heads": "random heads",
    "random tokens": "random tokens",
    "inhibition alone, random heads": "random heads for inhibition",
    "negative mover alone, random heads": "random heads for negative mover",
}
_PATTERN_ROLES = ("induction", "duplicate token", "previous token")


def save_patch(result: PatchResult, folder: str | os.PathLike, attention: list[AttentionView] | None = None) -> Path:
    """Write what patching found: `report.html`, `results.json`, `results.csv` and, with matplotlib, `effects.png`.

    Args:
        result ([`PatchResult`]): With two axes.
        folder (`str` or `os.PathLike`): The folder, made if it does not exist.
        attention (`list[AttentionView]`, *optional*): Patterns to show beneath.

    Returns:
        `Path`: the page.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    result.to_json(folder / "results.json")
    result.to_csv(folder / "results.csv")
    protocol = result.protocol
    name = _TITLES.get(protocol.get("task"), protocol.get("task", ""))  # pyright: ignore[reportCallIssue]
    heatmap = result_heatmap(result, f"{protocol.get('method', 'patching').capitalize()}: {name}")
    if find_spec("matplotlib"):
        write_png(folder / "effects.png", heatmap)
    rows = [
        [*(place[axis] for axis in result.axes), place["effect"], *_interval(result, place)]
        for place in result.top(10)
    ]
    top = Table("The ten greatest effects", [*result.axes, "effect", "from", "to"], rows, _unit(result))
    section = Section(heatmap.title, tables=[top], heatmaps=[heatmap], attention=attention or [])
    return write_page(folder / "report.html", f"{heatmap.title}, {protocol.get('model', '')}", [section], protocol)


def result_heatmap(result: PatchResult, title: str, marks: dict | None = None) -> Heatmap:
    """The effects of a [`PatchResult`] with two axes as a heatmap with intervals."""
    low, high = result.intervals()
    (row_label, rows), (column_label, columns) = result.axes.items()
    return Heatmap(
        title,
        result.effects.tolist(),
        rows,
        columns,
        row_label,
        column_label,
        low.tolist(),
        high.tolist(),
        marks or {},
        _unit(result),
        {**result.protocol, "metric": result.metric, "intervals": "95%, bootstrap over prompts"},
    )


def save_reuse(result: CircuitReuse, folder: str | os.PathLike) -> Path:
    """Write a study of circuit reuse: `report.html`, `results.json`, CSV files and, with matplotlib, PNG files.

    Args:
        result ([`CircuitReuse`]): What [`reuse_circuit`] found.
        folder (`str` or `os.PathLike`): The folder, made if it does not exist.

    Returns:
        `Path`: the page.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "results.json", to_json(result.to_dict(), indent=1))
    marks = _marks(result)
    maps = {}
    for task, stages in result.stages.items():
        for number, stage in enumerate(stages, 1):
            title = f"{_TITLES[task]}, stage {number}: {stage.name}"
            maps.setdefault(number, []).append(result_heatmap(stage.result, title, marks))
            name = f"{task}_{number}_{stage.name.replace(' ', '_')}"
            stage.result.to_csv(folder / f"{name}.csv")
            if find_spec("matplotlib"):
                write_png(folder / f"{name}.png", maps[number][-1])
    tables = {
        "overlap": _overlap_table(result),
        "repair": _repair_csv(result),
        "roles": _roles_table(result),
        "scores": _scores_csv(result),
    }
    for name, table in tables.items():
        write_csv(folder / f"{name}.csv", table.headers, table.rows)
    sections = [
        Section("How well the model does the tasks", tables=[_accuracy_table(result)]),
        Section(
            "Overlap of the two circuits",
            "Of the heads with the greatest effects in each stage, those that both tasks share, against what chance gives.",
            tables=[_overlap_table(result)],
        ),
        Section("Heads by role", tables=[_roles_table(result), _scores_table(result), *_published_heads(result)]),
    ]
    if result.faithfulness:
        sections.append(
            Section(
                "Cross-task faithfulness",
                "All heads outside a circuit are held at their mean; 1 is the whole model and 0 is no head left alone. "
                "A circuit that only one task uses does little for the other.",
                tables=[_faithfulness_table(result, task) for task in result.faithfulness],
            )
        )
    sections.append(
        Section(
            "The repair of Colored Objects",
            "From the last token, inhibition heads and negative movers are made to look at the two wrong colours. The edit "
            "uses the right answer: it shows what the heads do, and is no way to use a model.",
            tables=[table for repair in result.repairs for table in _repair_tables(result, repair)],
        )
    )
    sections.append(
        Section(
            "Path patching, stage by stage",
            "Orange: the head helps the task. Blue: it works against it. Framed: movers, negative movers, inhibition heads and content gatherers.",
            heatmaps=[each for number in sorted(maps) for each in maps[number]],
        )
    )
    if result.attention:
        sections.append(Section("Where heads look", attention=result.attention))
    return write_page(folder / "report.html", f"Circuit reuse, {result.protocol['model']}", sections, result.protocol)


def summary(result: CircuitReuse) -> str:
    """The main numbers as text for a terminal."""
    tables = [_accuracy_table(result), _overlap_table(result), _roles_table(result)]
    tables += [_faithfulness_table(result, task) for task in result.faithfulness]
    tables += [table for repair in result.repairs for table in _repair_tables(result, repair)]
    lines = []
    for table in tables:
        rows = [[_text(cell) for cell in row] for row in table.rows]
        lines += ["", printable(table.title), aligned(table.headers, rows, left=len(table.headers), rule=False)]
    if result.published is not None:
        lines += ["", f"Paper: {result.published.source}", _footnotes(result.published)]
    return "\n".join(lines).lstrip()


def _accuracy_table(result):
    paper = result.published.figures if result.published else {}
    rows = []
    for task, metrics in result.accuracy.items():
        row = [_TITLES[task], *(str(metrics[name]) for name in ("accuracy", "candidate_accuracy", "logit_difference"))]
        rows.append(row + [paper.get(f"accuracy, {task}", "")] if paper else row)
    headers = ["task", "accuracy, full vocabulary", "accuracy among candidates", "logit difference"]
    note = f"{result.protocol['prompts']} prompts; 95% intervals."
    note += _see_notes(result)
    return Table("Clean prompts", headers + ["paper"] if paper else headers, rows, note)


def _overlap_table(result):
    paper = result.published.figures if result.published else {}
    rows = []
    for each in result.overlaps:
        row = [
            f"{each.share:.0%}",
            each.count,
            f"{each.shared} of {each.possible}",
            f"{each.fraction:.1%}",
            f"{each.low:.1%} to {each.high:.1%}",
            f"{each.null:.1%} (95th percentile {each.null_high:.1%})",
            f"{each.p_value:.2g}",
            f"{each.layer_null:.1%}, p {each.layer_p_value:.2g}",
        ]
        rows.append(row + [paper.get(f"overlap at {each.share:.0%}", "")] if paper else row)
    headers = ["top", "heads a stage", "shared", "overlap", "bootstrap 95%", "null: any head", "p", "null: same layer"]
    note = "Heads count by magnitude. The interval resamples prompts with the receivers kept; it tends to lie low, as noise moves heads out of the top."
    return Table("Overlap", headers + ["paper"] if paper else headers, rows, note + _see_notes(result))


def _roles_table(result):
    rows = [[role, ", ".join(map(_head, heads)) or "none", ROLES[role]] for role, heads in result.roles.heads.items()]
    tests = result.roles.tests
    note = (
        f"A head acts if it is in the top {tests.share:.0%} by magnitude and its 95% interval leaves out 0. Attention of at "
        f"least {tests.attention}, copying of at least {tests.copying} (among the five highest or lowest logits), patterns on "
        f"random tokens of at least {tests.pattern}. Heads as layer.head, the strongest first."
    )
    return Table("Heads that pass the tests", ["role", "heads", "test"], rows, note)


def _scores_table(result):
    """What patterns on random tokens, and what the weights alone, say of each head that has a role."""
    evidence = result.roles.evidence
    names = [
        name
        for name in evidence
        if name.startswith("weights:") or name in ("copying", "negative copying", *_PATTERN_ROLES)
    ]
    roles = {}
    for role, heads in result.roles.heads.items():
        for head in heads:
            roles.setdefault(head, []).append(role)
    rows = [
        [_head(head), ", ".join(roles[head]), *(f"{evidence[name][head].item():.2f}" for name in names)]
        for head in sorted(roles)
    ]
    middle = [f"{evidence[name].median().item():.2f}" for name in names]
    rows.append(["all heads", "median", *middle])
    note = (
        "Previous token, duplicate token and induction: mean attention on random tokens repeated once. From the weights "
        "alone, and not used as tests: how often a name's query matches its own key best among those of all names; attention "
        "to the position before where all tokens are the mean token; and K-composition (Elhage et al., 2021) with the "
        f"previous-token heads {', '.join(map(_head, result.roles.previous))}, the greatest of them."
    )
    return Table("Scores of these heads", ["head", "roles", *names], rows, note)


def _published_heads(result):
    if result.published is None:
        return []
    rows = []
    for role, heads in result.published.heads.items():
        found = result.roles.heads.get(role, [])
        shared = [head for head in heads if head in found]
        rows.append([role, ", ".join(map(_head, heads)), f"{len(shared)} of {len(heads)}"])
    headers = ["role", "published heads", "found here"]
    return [Table(f"Published: {result.published.source}", headers, rows, _footnotes(result.published))]


def _faithfulness_table(result, task):
    rows = [
        [
            each.circuit,
            each.heads,
            f"{_two(each.value)} [{_two(each.low)}, {_two(each.high)}]",
            f"{_two(each.difference)} [{_two(each.difference_low)}, {_two(each.difference_high)}]",
        ]
        for each in result.faithfulness[task]
    ]
    headers = ["circuit", "heads", "faithfulness", "logit difference, nats"]
    whole, nothing = result.faithfulness[task][:2]
    note = "95% intervals, bootstrap over prompts."
    if whole.difference_low <= nothing.difference_high:
        note += (
            " The intervals of the logit difference with all heads and with none overlap (or no head does better), so "
            "faithfulness, which is a share of the way between them, says nothing here."
        )
    return Table(f"{_TITLES[task]}: what a circuit keeps", headers, rows, note)


def _repair_tables(result, repair):
    chosen = (
        f"inhibition {', '.join(map(_head, repair.inhibition)) or 'none'}; "
        f"negative mover {', '.join(map(_head, repair.negative)) or 'none'}"
    )
    title = f"Heads by {repair.selection}: {chosen}"
    if not repair.outcomes:
        return [Table(title, ["outcome"], [["No head passes the tests, so there is nothing to edit."]])]
    paper = result.published.figures if result.published else {}
    rows, draws = [], {}
    for each in repair.outcomes:
        if each.condition[-1].isdigit():
            draws.setdefault(each.condition.rstrip("0123456789 "), []).append(each)
            continue
        row = [
            each.condition,
            str(each.accuracy),
            *([paper.get(each.condition, "")] if paper else []),
            str(each.candidate_accuracy),
            "{right} / {wrong_listed} / {other}".format(**each.confusion),
            each.fixed,
            each.new_mistakes,
        ]
        rows.append(row)
    for control, found in draws.items():
        row = [
            f"{_CONTROLS[control]} ({len(found)} draws)",
            _range([each.accuracy.mean for each in found]),
            *([""] if paper else []),
            _range([each.candidate_accuracy.mean for each in found]),
            " / ".join(
                f"{sum(each.confusion[kind] for each in found) / len(found):.1f}"
                for kind in ("right", "wrong_listed", "other")
            ),
            _counts([each.fixed for each in found]),
            _counts([each.new_mistakes for each in found]),
        ]
        rows.append(row)
    headers = [
        "edit",
        "accuracy",
        *(["paper"] if paper else []),
        "among candidates",
        "right / wrong listed / other",
        "fixed",
        "new mistakes",
    ]
    note = (
        "Accuracy in the full vocabulary with Wilson's 95% interval. Controls: mean of the draws, from the lowest to the "
        "highest; random heads are other heads of the same layers, all of them where they are few; each draw is in repair.csv."
    )
    tables = [Table(title, headers, rows, note + _see_notes(result))]
    if repair.movers is not None:
        tables.append(_mover_table(repair.movers, paper))
    return tables


def _mover_table(change, paper):
    # A ratio of attributions means something only where the first is positive.
    grown = change.attribution_after / change.attribution_before if change.attribution_before > 0 else None
    rows = [
        ["attention to the right colour", f"{change.right_before:.1%}", f"{change.right_after:.1%}"],
        ["attention to wrong colours", f"{change.wrong_before:.1%}", f"{change.wrong_after:.1%}"],
        ["logit attribution, nats", _two(change.attribution_before), _two(change.attribution_after)],
        ["spearman", "", f"{change.spearman:.2f} (p {change.p_value:.2g}; {change.compared} heads)"],
    ]
    figures = {"logit attribution, nats": "logit attribution"}
    changes = [
        f"{100 * (change.right_after - change.right_before):+.1f} points",
        f"{100 * (change.wrong_after - change.wrong_before):+.1f} points",
        "" if grown is None else f"{grown:.1f} times",
        "",
    ]
    rows = [[*row, each] for row, each in zip(rows, changes, strict=True)]
    headers = ["", "before", "after", "change"]
    if paper:
        rows = [[*row, paper.get(figures.get(row[0], row[0]), "")] for row in rows]
        headers.append("paper")
    note = (
        "Movers are the heads with the greatest effect on the logits of Colored Objects that are behind the edited ones. "
        "Spearman: change of logit attribution against effect on the logits in path patching, over heads behind the edit."
    )
    return Table(f"Movers behind the edit: {', '.join(map(_head, change.movers))}", headers, rows, note)


def _repair_csv(result):
    rows = [
        [
            repair.selection,
            each.condition,
            " ".join(map(_head, each.heads)),
            *(each.accuracy.mean, each.accuracy.low, each.accuracy.high),
            *(each.candidate_accuracy.mean, each.candidate_accuracy.low, each.candidate_accuracy.high),
            *each.confusion.values(),
            each.fixed,
            each.new_mistakes,
        ]
        for repair in result.repairs
        for each in repair.outcomes
    ]
    headers = ["selection", "edit", "heads", "accuracy", "low", "high", "candidate_accuracy", "candidate_low"]
    return Table("", [*headers, "candidate_high", "right", "wrong_listed", "other", "fixed", "new_mistakes"], rows)


def _scores_csv(result):
    evidence = result.roles.evidence
    layers, heads = next(iter(evidence.values())).shape
    rows = [
        [layer, head, *(table[layer, head].item() for table in evidence.values())]
        for layer in range(layers)
        for head in range(heads)
    ]
    return Table("", ["layer", "head", *evidence], rows)


def _marks(result):
    marks = {}
    for role in ("mover", "negative mover", "inhibition", "content gatherer"):
        for head in result.roles.heads[role]:
            marks[head] = f"{marks[head]}, {role}" if head in marks else role
    return marks


def _footnotes(published):
    return "\n".join(f"({number}) {note}" for number, note in enumerate(published.footnotes, 1))


def _see_notes(result):
    return "" if result.published is None else " On the paper's figures see the notes to its heads."


def _range(values):
    return f"{sum(values) / len(values):.3f} ({min(values):.3f}–{max(values):.3f})"


def _counts(values):
    return f"{sum(values) / len(values):.1f} ({min(values)}–{max(values)})"


def _interval(result, place):
    low, high = result.intervals()
    at = tuple(result.axes[axis].index(place[axis]) for axis in result.axes)
    return [low[at].item(), high[at].item()]


def _unit(result):
    if result.source is None:
        return f"Change of {result.metric.replace('_', ' ')} where the place is ablated; hover for intervals."
    return "Share of the way from the base run to the source run (0 to 1); hover for intervals."


def _two(value):
    """Two digits, without a minus before zero."""
    return f"{round(value, 2) + 0.0:.2f}"


def _head(head):
    return f"{head[0]}.{head[1]}"


def _text(cell):
    return f"{cell:.4g}" if isinstance(cell, float) else str(cell)
