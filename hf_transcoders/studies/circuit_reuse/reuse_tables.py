"""The tables of a study of circuit reuse."""

from dataclasses import replace
from typing import TYPE_CHECKING

from ...circuits.patching.report import task_title
from ...reports.sections import Table, tables_text
from ...text.printable import printable
from .outcome_rows import OUTCOME_COLUMNS, OUTCOME_HEADERS, head_name, outcome_rows, outcome_values
from .roles import ROLES


if TYPE_CHECKING:
    from .reuse_results import CircuitReuse, Repair


_PATTERN_ROLES = ("induction", "duplicate token", "previous token")


def reuse_text(result: "CircuitReuse") -> str:
    """The main numbers of a study as text for a terminal."""
    tables = [accuracy_table(result), overlap_table(result), roles_table(result)]
    tables += [faithfulness_table(result, task) for task in result.faithfulness]
    tables += [table for repair in result.repairs for table in repair_tables(result, repair)]
    text = tables_text([replace(table, note="") for table in tables])
    if result.warnings:
        text = "\n".join([*(f"WARNING: {printable(warning)}" for warning in result.warnings), "", text])
    if result.search is not None:
        text = f"{text}\n\n{result.search}"
    if result.published is None:
        return text
    return "\n".join([text, "", f"Paper: {result.published.source}", _footnotes(result.published)])


def accuracy_table(result: "CircuitReuse") -> Table:
    """Metrics of the clean prompts of both tasks."""
    metrics = ("accuracy", "candidate_accuracy", "logit_difference")
    rows = [[task_title(task), *(str(found[name]) for name in metrics)] for task, found in result.accuracy.items()]
    headers = ["task", "accuracy, full vocabulary", "accuracy among candidates", "logit difference"]
    note = f"{result.protocol['prompts']} prompts; 95% intervals."
    return _with_paper(result, "Clean prompts", headers, rows, note, [f"accuracy, {task}" for task in result.accuracy])


def overlap_table(result: "CircuitReuse") -> Table:
    """Heads that both tasks share at each threshold, against chance."""
    rows = [
        [
            f"{each.share:.0%}",
            each.count,
            f"{each.shared} of {each.possible}",
            f"{each.fraction:.1%}",
            f"{each.low:.1%} to {each.high:.1%}",
            f"{each.null:.1%} (95th percentile {each.null_high:.1%})",
            f"{each.p_value:.2g}",
            f"{each.layer_null:.1%}, p {each.layer_p_value:.2g}",
        ]
        for each in result.overlaps
    ]
    headers = ["top", "heads a stage", "shared", "overlap", "bootstrap 95%", "null: any head", "p", "null: same layer"]
    note = (
        "Heads are ranked by magnitude. The interval resamples prompts and keeps the receivers; it tends to be low, because "
        "noise moves heads out of the top."
    )
    keys = [f"overlap at {each.share:.0%}" for each in result.overlaps]
    return _with_paper(result, "Overlap", headers, rows, note, keys)


def roles_table(result: "CircuitReuse") -> Table:
    """Heads of each role."""
    rows = [
        [role, ", ".join(map(head_name, heads)) or "none", ROLES[role]] for role, heads in result.roles.heads.items()
    ]
    tests = result.roles.tests
    note = (
        f"A head acts in a stage if it is in the top {tests.share:.0%} by magnitude and its 95% interval excludes 0. Attention "
        f"of at least {tests.attention}, copying of at least {tests.copying} (among the five highest or lowest logits), "
        f"attention on random tokens of at least {tests.pattern}. Heads as layer.head, the strongest first."
    )
    return Table("Heads that pass the tests", ["role", "heads", "test"], rows, note)


def scores_table(result: "CircuitReuse") -> Table:
    """Scores of the heads with a role, on random tokens and from the weights alone."""
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
        [head_name(head), ", ".join(roles[head]), *(f"{evidence[name][head].item():.2f}" for name in names)]
        for head in sorted(roles)
    ]
    middle = [f"{evidence[name].median().item():.2f}" for name in names]
    rows.append(["all heads", "median", *middle])
    note = (
        "Previous token, duplicate token and induction: mean attention on repeated random tokens. From the weights alone, and "
        "not used as tests: how often the query of a name matches its own key better than the keys of all other names; "
        "attention to the previous position in a text of mean tokens; and the greatest K-composition (Elhage et al., 2021) "
        f"with the previous-token heads {', '.join(map(head_name, result.roles.previous))}."
    )
    return Table("Scores of these heads", ["head", "roles", *names], rows, note)


def published_heads_tables(result: "CircuitReuse") -> list[Table]:
    """Published heads of each role, if there are any for this model."""
    if result.published is None:
        return []
    rows = []
    for role, heads in result.published.heads.items():
        found = result.roles.heads.get(role, [])
        shared = [head for head in heads if head in found]
        rows.append([role, ", ".join(map(head_name, heads)), f"{len(shared)} of {len(heads)}"])
    headers = ["role", "published heads", "found here"]
    return [Table(f"Published: {result.published.source}", headers, rows, _footnotes(result.published))]


def faithfulness_table(result: "CircuitReuse", task: str) -> Table:
    """Faithfulness of circuits on one task."""
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
            " The intervals of the logit difference with all heads and with no head overlap, or no head has the greater "
            "difference, so faithfulness has no meaning here."
        )
    return Table(f"{task_title(task)}: faithfulness of circuits", headers, rows, note)


def repair_tables(result: "CircuitReuse", repair: "Repair") -> list[Table]:
    """Outcomes and mover changes of the repair with one selection of heads."""
    chosen = (
        f"inhibition {', '.join(map(head_name, repair.inhibition)) or 'none'}; "
        f"negative mover {', '.join(map(head_name, repair.negative)) or 'none'}"
    )
    title = f"Heads by {repair.selection}: {chosen}"
    if not repair.outcomes:
        return [Table(title, ["outcome"], [["No head passes the tests, so there is nothing to edit."]])]
    rows = outcome_rows(repair.outcomes)
    note = (
        "Accuracy in the full vocabulary with Wilson's 95% interval. Controls: mean of the draws, with the lowest and the "
        "highest in parentheses; random heads are other heads of the same layers, all of them if there are few; repair.csv "
        "lists each draw."
    )
    tables = [_with_paper(result, title, OUTCOME_HEADERS, rows, note, [row[0] for row in rows])]
    return tables if repair.movers is None else [*tables, _mover_table(result, repair.movers)]


def _mover_table(result, change):
    # A ratio of attributions has a meaning only if the first is positive.
    grown = change.attribution_after / change.attribution_before if change.attribution_before > 0 else None
    rows = [
        [
            "attention to the right color",
            f"{change.right_before:.1%}",
            f"{change.right_after:.1%}",
            f"{100 * (change.right_after - change.right_before):+.1f} points",
        ],
        [
            "attention to wrong colors",
            f"{change.wrong_before:.1%}",
            f"{change.wrong_after:.1%}",
            f"{100 * (change.wrong_after - change.wrong_before):+.1f} points",
        ],
        [
            "logit attribution, nats",
            _two(change.attribution_before),
            _two(change.attribution_after),
            "" if grown is None else f"{grown:.1f} times",
        ],
        ["spearman", "", f"{change.spearman:.2f} (p {change.p_value:.2g}; {change.compared} heads)", ""],
    ]
    note = (
        "Movers are the heads after the edited ones with the greatest effect on the logits of Colored Objects. Spearman: "
        "change of logit attribution against effect on the logits in path patching, over heads after the edit."
    )
    title = f"Movers after the edit: {', '.join(map(head_name, change.movers))}"
    keys = ["attention to the right colour", "attention to wrong colours", "logit attribution", "spearman"]
    return _with_paper(result, title, ["", "before", "after", "change"], rows, note, keys)


def repair_csv(result: "CircuitReuse") -> Table:
    """Outcomes of all repairs, with every draw."""
    rows = [[repair.selection, *outcome_values(each)] for repair in result.repairs for each in repair.outcomes]
    return Table("", ["selection", *OUTCOME_COLUMNS], rows)


def scores_csv(result: "CircuitReuse") -> Table:
    """All scores of all heads."""
    evidence = result.roles.evidence
    layers, heads = next(iter(evidence.values())).shape
    rows = [
        [layer, head, *(table[layer, head].item() for table in evidence.values())]
        for layer in range(layers)
        for head in range(heads)
    ]
    return Table("", ["layer", "head", *evidence], rows)


def _footnotes(published):
    return "\n".join(f"({number}) {note}" for number, note in enumerate(published.footnotes, 1))


def _with_paper(result, title, headers, rows, note, keys):
    """A table with a last column of published figures, if there are any for this model; `keys` names that of each row."""
    if result.published is None:
        return Table(title, headers, rows, note)
    rows = [[*row, result.published.figures.get(key, "")] for row, key in zip(rows, keys, strict=True)]
    note += " For the paper's figures, see the notes to its heads."
    return Table(title, [*headers, "paper"], rows, note)


def _two(value):
    """A number with two decimals, without a minus sign for zero."""
    return f"{round(value, 2) + 0.0:.2f}"
