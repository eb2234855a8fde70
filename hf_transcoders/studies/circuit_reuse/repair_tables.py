"""The tables of repairs that were found by search."""

from typing import TYPE_CHECKING

import torch

from ...circuits.patching.report import task_title
from ...reports.sections import Table, tables_text
from .outcome_rows import OUTCOME_COLUMNS, OUTCOME_HEADERS, head_name, outcome_rows, outcome_values
from .published_heads import GPT2_MEDIUM


if TYPE_CHECKING:
    from .found_repair import RepairStudy


def repair_text(study: "RepairStudy") -> str:
    """The main numbers of a study as text for a terminal."""
    return tables_text(all_tables(study))


def all_tables(study: "RepairStudy") -> list[Table]:
    """All tables of a study, the repairs found first."""
    return [
        found_table(study),
        *outcome_tables(study),
        *paper_tables(study),
        *evidence_tables(study),
        *downstream_tables(study),
        *ioi_tables(study),
    ]


def found_table(study: "RepairStudy") -> Table:
    """The repair with each set of tokens, on the prompts of the search and on other prompts."""
    objective = study.protocol["objective"]
    first = study.search.repairs[0]
    none = study.outcomes[first.tokens][0]
    rows = [
        [
            "unchanged",
            "",
            f"{getattr(first.steps[0], objective):.1%}",
            str(none.accuracy),
            str(none.candidate_accuracy),
            "",
            "",
        ]
    ]
    for repair in study.search.repairs:
        searched = f"{getattr(repair.steps[-1], objective):.1%}"
        if not repair.heads:
            rows.append([repair.tokens, "none", searched, *[""] * 4])
            continue
        judged = next(each for each in study.outcomes[repair.tokens] if each.condition == "repair")
        mixed = len({each.tokens for each in repair.heads}) > 1 or repair.heads[0].tokens != repair.tokens
        heads = ", ".join(str(each) if mixed else head_name(each.head) for each in repair.heads)
        accuracies = [str(judged.accuracy), str(judged.candidate_accuracy)]
        rows.append([repair.tokens, heads, searched, *accuracies, judged.fixed, judged.new_mistakes])
    headers = ["attends to", "heads", "search", "accuracy", "among candidates", "fixed", "new mistakes"]
    searched_by = "in the full vocabulary" if objective == "accuracy" else "among candidates"
    note = (
        f"Search: accuracy {searched_by} on the {study.protocol['prompts']} prompts of the search, which is too high because the "
        f"heads are the best of many. The other columns are of {study.protocol['judged_prompts']} other prompts, with Wilson's "
        "95% intervals; fixed prompts and new mistakes are counted in the full vocabulary. Heads are in the order in which they were found. A set that holds the answer gives it away: a head "
        "that copies needs no more than to attend to it."
    )
    return Table("Repairs found", headers, rows, note)


def outcome_tables(study: "RepairStudy") -> list[Table]:
    """The explained repairs and their controls."""
    note = (
        "On the prompts for judging. Controls: mean of the draws, with the lowest and the highest in parentheses; random heads are "
        "other heads of the same layers on the same tokens, all of them if there are few; random tokens are as many other "
        "tokens before the query token, without the first."
    )
    return [
        Table(
            f"Forced onto {repair.tokens}: {', '.join(map(str, repair.heads))}",
            OUTCOME_HEADERS,
            outcome_rows(study.outcomes[repair.tokens]),
            note,
        )
        for repair in study.explained
    ]


def paper_tables(study: "RepairStudy") -> list[Table]:
    """The figures of the paper on its model, if the task is that of the paper."""
    if study.protocol["task"] != "colored-objects":
        return []
    names = {
        "none": "none",
        "inhibition + negative mover": "12.3, 13.4, 13.13 and 19.1 to the wrong colors",
        "inhibition alone": "12.3, 13.4, 13.13",
        "negative mover alone": "19.1",
    }
    rows = [[text, GPT2_MEDIUM.figures[key]] for key, text in names.items()]
    note = "Heads that the paper found through IOI; figures are of its own prompts."
    return [Table(f"GPT-2 medium: {GPT2_MEDIUM.source}", ["edit", "accuracy"], rows, note)]


def evidence_tables(study: "RepairStudy") -> list[Table]:
    """Where the heads of the explained repairs attend without an edit, their effects and their roles."""
    if not study.heads:
        return []
    tables = []
    for task in study.heads[0].attention:
        names = list(study.heads[0].attention[task])
        rows = [
            [head_name(each.head), *(f"{each.attention[task][name]:.1%}" for name in names)] for each in study.heads
        ]
        query = study.protocol["query"] if task == study.protocol["task"] else "END"
        tables.append(
            Table(
                f"Attention from {query} without an edit, {task_title(task)}",
                ["head", *names],
                rows,
                "Mean over prompts. A token can have several names.",
            )
        )
    if not study.heads[0].effects:
        return tables
    names = list(study.heads[0].effects)
    rows = []
    for each in study.heads:
        effects = [each.effects[name] for name in names]
        cells = [f"{at.effect:+.1%} [{at.low:+.1%}, {at.high:+.1%}], {at.rank} of {at.heads}" for at in effects]
        rows.append([head_name(each.head), *cells])
    note = (
        "Share of the way to the corrupted run, with a bootstrap interval over prompts, and the rank of its magnitude."
    )
    headers = ["head", *(f"{task_title(name.split(', ')[0])}, {name.split(', ')[1]}" for name in names)]
    tables.append(Table("Effects in path patching without an edit", headers, rows, note))
    names = [name for name in study.heads[0].scores if not name.startswith(("attention", "IOI", "Colored"))]
    rows = [
        [head_name(each.head), ", ".join(each.roles) or "none", *(f"{each.scores[name]:.2f}" for name in names)]
        for each in study.heads
    ]
    tables.append(
        Table(
            "Roles by every test",
            ["head", "roles", *names],
            rows,
            "The tests are those of the study of circuit reuse.",
        )
    )
    return tables


def downstream_tables(study: "RepairStudy") -> list[Table]:
    """Later heads that change most under each explained repair."""
    tables = []
    for tokens, change in study.downstream.items():
        shown = _moved(change)
        headers = ["head", "attribution before", "after", *(f"to {change.positions[at]}" for at in shown)]
        rows = []
        for head in change.most_changed():
            attention = [
                f"{change.attention_before[head][at].item():.1%} → {change.attention_after[head][at].item():.1%}"
                for at in shown
            ]
            before, after = change.attribution_before[head].item(), change.attribution_after[head].item()
            rows.append([head_name(head), f"{before:+.2f}", f"{after:+.2f}", *attention])
        note = (
            "Attribution of the logit difference, in nats, and attention from END to the tokens where it changes most."
        )
        if change.spearman == change.spearman:
            note += (
                f" Spearman correlation of the change of attribution with the effect on the logits in path patching, over "
                f"{change.compared} later heads: {change.spearman:.2f} (p {change.p_value:.2g})."
            )
        tables.append(Table(f"Later heads, forced onto {tokens}", headers, rows, note))
    return tables


def _moved(change, count=4):
    """Indices of the tokens to which the attention of the most changed heads changes most."""
    heads = change.most_changed()
    if not heads:
        return []
    moved = torch.stack([change.attention_after[head] - change.attention_before[head] for head in heads]).abs().sum(0)
    return sorted(moved.argsort(descending=True)[:count].tolist())


def ioi_tables(study: "RepairStudy") -> list[Table]:
    """IOI with the heads of each explained repair forced."""
    return [
        Table(
            f"IOI with the heads of the repair onto {tokens}",
            OUTCOME_HEADERS,
            outcome_rows(outcomes),
            "The same heads, forced onto tokens of IOI. A head that steers the movers of IOI fixes or breaks prompts here too.",
        )
        for tokens, outcomes in study.in_ioi.items()
    ]


def outcomes_csv(study: "RepairStudy") -> Table:
    """All outcomes on the prompts for judging and on IOI, with every draw."""
    rows = [
        [task, tokens, *outcome_values(each)]
        for task, found in ((study.protocol["task"], study.outcomes), ("ioi", study.in_ioi))
        for tokens, outcomes in found.items()
        for each in outcomes
    ]
    return Table("", ["task", "tokens", *OUTCOME_COLUMNS], rows)
