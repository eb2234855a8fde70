"""The limitations of the dictionaries of a card, and the properties that were not measured."""

from ...evaluation.cautions import cautions
from ...evaluation.evaluation_report import HEADLINE_METRICS, METRICS
from ...text.markdown import Markdown, code, escape
from .facts import CardFacts
from .wording import listed


def limits(facts: CardFacts) -> list[Markdown]:
    """The limitations, one per entry."""
    lines = [
        *_cautions(facts),
        _of_base(facts),
        *_of_left_out_tokens(facts),
        *_of_dead_features(facts),
        _of_text(facts),
    ]
    return [Markdown(line) for line in (*lines, _not_measured(facts))]


def _cautions(facts: CardFacts) -> list[str]:
    """Reasons why results are invalid or uncertain: for each evaluation, and once for everything known without one."""
    lines = {}
    for report in facts.reports:
        configs = {name: facts.configs[name] for name in report.dictionaries}
        lines |= dict.fromkeys(cautions(configs, report.metrics, report.protocol["fidelity_tokens"]).values())
    unmeasured = {name: config for name, config in facts.configs.items() if name not in facts.metrics}
    lines |= dict.fromkeys(cautions(unmeasured, {}).values())
    return [f"**{escape(line)}**" for line in lines]


def _of_base(facts: CardFacts) -> str:
    if facts.base_model is None:
        return "The base model was not recorded: these weights mean nothing for any other."
    revision = (
        f"revision {code(facts.revision)}"
        if facts.revision
        else "the revision that was current at the time; which one was not recorded"
    )
    origins = listed(dict.fromkeys(c.base_model_weights for c in facts.configs.values() if c.base_model_weights))
    weights = (
        f" The weights it had in training were not those of that name, but of {origins}: with the original weights, the "
        "numbers are others."
        if origins
        else ""
    )
    return (
        f"Made for {code(facts.base_model)}, {revision}.{weights} On another revision, a fine-tuned version or another precision "
        "nothing here was measured."
    )


def _of_left_out_tokens(facts: CardFacts) -> list[str]:
    lines = []
    if first := _common(facts, "skip_first"):
        lines.append(
            f"The first {'position' if first == 1 else f'{first} positions'} of every block of text "
            f"{'was' if first == 1 else 'were'} left out of training and evaluation, because models park an attention "
            "sink there with activations many times the usual size. Features there mean nothing, and a dictionary put "
            "in place of the model's own activations should leave that position as it is (`splice(..., mask=...)`)."
        )
    if any(report.protocol["special_token_ids"] for report in facts.reports):
        lines.append("Special tokens (beginning and end of text, padding) were left out as well.")
    if outlier := _common(facts, "outlier_factor"):
        lines.append(f"Training also left out tokens whose activation is longer than {outlier:g} medians.")
    return lines


def _of_dead_features(facts: CardFacts) -> list[str]:
    lines = []
    for report in facts.reports:
        never = {name: entry["density_histogram"]["never_fired"] for name, entry in report.dictionaries.items()}
        silent = [name for name, count in never.items() if count]
        most = ""
        if facts.many and silent:
            # The table has the share of each.
            most = f"some in {len(silent)} of {len(never)} dictionaries, at most "
            silent = [max(silent, key=never.get)]  # pyright: ignore[reportCallIssue]
        counts = most + listed(
            Markdown(
                f"{never[name]:,} of {facts.configs[name].num_features:,}"
                + ("" if facts.only else f" in {code(name)}")
            )
            for name in silent
        )
        tokens = f"{report.protocol['fidelity_tokens']:,}"
        lines.append(
            f"Features that never fired on the {tokens} tokens of the evaluation: {counts}. They may be dead, or rarer "
            "than this text can show."
            if counts
            else f"Every feature fired at least once on the {tokens} tokens of the evaluation."
        )
    return lines


def _of_text(facts: CardFacts) -> str:
    data = dict.fromkeys(s["dataset"] for s in facts.summaries.values() if s.get("dataset"))
    trained = f"Trained on {listed(data)}" if data else "What text it was trained on was not recorded"
    length = _common(facts, "context_length")
    contexts = f" and contexts of more than {length} tokens" if length else ""
    return f"{trained}. Other kinds of text, other languages{contexts} were not measured."


def _not_measured(facts: CardFacts) -> str:
    missing = []
    if not facts.metrics:
        missing.append("how well they reconstruct, and what the language model loses with them in place")
    else:
        measured = facts.metrics.values()
        unknown = [METRICS[metric] for metric in HEADLINE_METRICS if any(metric not in m for m in measured)]
        if unknown:
            missing.append(listed(unknown) + " (where the table has a dash)")
        if facts.only is None and facts.together is None:
            missing.append("the language model with all dictionaries in place at once")
    missing.append("what single features mean: a name given to one is a hypothesis")
    missing.append("whether the features are what the language model itself computes with, beyond its loss")
    return f"Not measured: {'; '.join(missing)}."


def _common(facts: CardFacts, key: str):
    """A value of the training summaries if all dictionaries share it; `None` otherwise."""
    values = {summary.get(key) for summary in facts.summaries.values()}
    return values.pop() if len(values) == 1 else None
