"""The training settings and the training log of a card."""

from collections.abc import Mapping, Sequence
from typing import Any

from ...evaluation.evaluation_report import METRICS, format_number
from ...text.markdown import Markdown, code, escape, one_line, table
from .facts import CardFacts, grouped
from .wording import listed


# Rows of the training log.
_LOG_ROWS = 12

# Key of the training summary -> its name on the card.
_SETTINGS = {
    "tokens": "tokens",
    "steps": "optimizer steps",
    "batch_tokens": "tokens of a step",
    "learning_rate": "learning rate",
    "lr_scheduler": "learning rate schedule",
    "warmup_steps": "warm-up steps",
    "optimizer": "optimizer",
    "weight_decay": "weight decay",
    "max_grad_norm": "gradient clipped at norm",
    "sparsity_warmup": "share of the run in which penalties rise",
    "dead_after_tokens": "tokens of silence after which a feature counts as dead",
    "precision": "precision of the dictionary's products",
    "base_model_dtype": "precision of the base model",
    "buffer_tokens": "tokens shuffled together",
    "processes": "processes",
    "device": "device",
    "seed": "seed",
}


def training(facts: CardFacts) -> list[dict[str, Markdown]]:
    """For each group of dictionaries that were trained alike: their names, a sentence and a table of settings."""
    groups = []
    for names in grouped(facts.summaries):
        every = len(names) == len(facts.configs)
        groups.append(
            {
                "names": None if every else listed(map(code, names)),
                "sentence": _sentence(facts.summaries[names[0]], len(names)),
                "table": table(("setting", "value"), _settings(facts, names[0]), numbers=False),
            }
        )
    return groups


def log_table(facts: CardFacts) -> Markdown | None:
    entries = _thinned(facts.log)
    if not entries:
        return None
    columns = {"step": "step", "tokens": "tokens", "loss": "loss"}
    if facts.only:
        for metric in ("fvu", "l0", "dead_fraction", "grad_norm"):
            columns[f"{facts.only}/{metric}"] = METRICS.get(metric, "gradient norm")
    elif not facts.many:
        columns |= {f"{name}/fvu": Markdown(f"FVU of {code(name)}") for name in facts.configs}
    columns = {key: head for key, head in columns.items() if any(key in entry for entry in entries)}
    rows = [
        [
            f"{entry[key]:,.0f}" if key in ("step", "tokens") and key in entry else format_number(entry.get(key))
            for key in columns
        ]
        for entry in entries
    ]
    return table(list(columns.values()), rows)


def log_note(facts: CardFacts) -> str | None:
    """A sentence about the log and the end of the run."""
    entries = facts.log
    if not entries:
        return None
    status = facts.run.facts.get("status")
    ended = f" It ended as '{status}'." if status in ("failed", "interrupted") else ""
    shown = len(_thinned(entries))
    which = f"{shown} of its {len(entries)} entries" if shown < len(entries) else "all of its entries"
    return f"The log of the run is on batches of training text, each seen before the step that learns from it; the table has {which}.{ended}"


def alerts(facts: CardFacts) -> Markdown | None:
    """Titles of the run's alerts with their counts."""
    titles = [one_line(alert["title"]) for alert in facts.run.alerts if "title" in alert] if facts.run else []
    counted = (f"{title} ({titles.count(title)})" for title in dict.fromkeys(titles))
    return listed(counted) if titles else None


def _sentence(summary: Mapping[str, Any], count: int) -> Markdown:
    data = escape(summary["dataset"]) if summary.get("dataset") else "text whose name was not recorded"
    rows = (
        f" ({summary['dataset_rows']:,} blocks of {summary['context_length']} tokens)"
        if summary.get("dataset_rows") and summary.get("context_length")
        else ""
    )
    tokens = f"{summary['tokens']:,} tokens" if summary.get("tokens") is not None else "tokens that were not counted"
    who = "Each of them was trained" if count > 1 else "Trained"
    return Markdown(f"{who} on activations of {tokens} from {data}{rows}, shuffled.")


def _settings(facts: CardFacts, name: str) -> list[tuple[str, str]]:
    config, summary = facts.configs[name], dict(facts.summaries[name])
    if not config.l1_coefficient and not config.l0_coefficient:
        summary.pop("sparsity_warmup", None)
    return [(head, _value(summary[key])) for key, head in _SETTINGS.items() if summary.get(key) is not None]


def _value(value) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _thinned(entries: Sequence, rows: int = _LOG_ROWS) -> list:
    """At most `rows` entries, evenly spaced, with the first and the last."""
    if len(entries) <= rows:
        return list(entries)
    return [entries[round(i * (len(entries) - 1) / (rows - 1))] for i in range(rows)]
