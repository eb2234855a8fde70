"""Effects of features on the next-token logits, and their tables."""

from dataclasses import asdict, dataclass
from typing import Any

from ...reports.sections import Table, tables_text
from ...text.columns import paired
from ...text.visible import visible


TokenChanges = list[tuple[str, float]]


@dataclass
class FeatureEffect:
    """
    What one feature does to the next-token logits. Logits are less their mean over the vocabulary, which does not matter for
    probabilities, and changes are means over contexts.

    Args:
        feature (`int`): Number of the feature.
        contexts (`int`): Number of contexts with the feature.
        example (`str`): The strongest context.
        activation (`float`): Mean activation in them.
        removed (`float`): Mean activation that was taken away until the feature was off.
        rounds (`float`): Mean number of times that it had to be taken away.
        still_active (`float`): Share of contexts in which it was active after the last round.
        kl (`float`): Mean KL divergence from the predictions with the feature to those without, in nats.
        raised, lowered (`list[tuple[str, float]]`):
            Tokens whose logits ablation raises and lowers most, of those that the model finds likely enough there.
        direct_raised, direct_lowered (`list[tuple[str, float]]`):
            The same by the direct path of minus the decoder row, per unit of activation and without the norm's scale.
        spearman (`float`): Rank correlation over the vocabulary of the change with that of the direct path; NaN without one.
        spearman_likely (`float`): The same over likely tokens.
    """

    feature: int
    contexts: int
    example: str
    activation: float
    removed: float
    rounds: float
    still_active: float
    kl: float
    raised: TokenChanges
    lowered: TokenChanges
    direct_raised: TokenChanges
    direct_lowered: TokenChanges
    spearman: float
    spearman_likely: float


@dataclass
class FeatureEffects:
    """
    Effects of features on logits.

    Args:
        features (`list[FeatureEffect]`): Effects by feature; features that never fire are left out.
        silent (`list[int]`): Features that never fired in the text.
        protocol (`dict`): Model, dictionary, text and settings.
    """

    features: list[FeatureEffect]
    silent: list[int]
    protocol: dict[str, Any]

    def to_text(self) -> str:
        """Format the tables and the protocol as text for a terminal."""
        tables = [summary_table(self), *map(tokens_table, self.features)]
        return "\n".join([tables_text(tables), "", paired(self.protocol)])

    __str__ = to_text

    def to_dict(self) -> dict[str, Any]:
        """Return all results as JSON values."""
        return asdict(self)


def summary_table(study: FeatureEffects) -> Table:
    headers = [
        "feature",
        "contexts",
        "activation",
        "removed",
        "rounds",
        "still on",
        "KL",
        "Spearman",
        "Spearman, likely",
    ]
    rows = [
        [each.feature, each.contexts, each.activation, each.removed, each.rounds, f"{each.still_active:.0%}", each.kl,
         each.spearman, each.spearman_likely]
        for each in study.features
    ]  # fmt: skip
    note = (
        "Means over contexts. Removed: activation that was taken away, in as many rounds, until the feature was off. KL: from the "
        "prediction with the feature to that without. Spearman: rank correlation over tokens of the change of logits with the "
        "direct path."
    )
    if study.silent:
        note += f" Never active in the text: {', '.join(map(str, study.silent))}."
    return Table("Ablated features", headers, rows, note)


def tokens_table(effect: FeatureEffect) -> Table:
    columns = (effect.raised, effect.lowered, effect.direct_raised, effect.direct_lowered)
    rows = [
        [f"{visible(repr(column[row][0]))} {column[row][1]:+.3f}" if row < len(column) else "" for column in columns]
        for row in range(max(map(len, columns)))
    ]
    headers = ["ablation raises", "ablation lowers", "direct path raises", "direct path lowers"]
    note = f"Change of logits, less its mean over the vocabulary, in {effect.contexts} contexts such as: {visible(effect.example, in_text=True)}"
    return Table(f"Feature {effect.feature}", headers, rows, note)
