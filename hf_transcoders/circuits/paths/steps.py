"""Steps and paths, from a target down through features and heads to embeddings."""

import math
from dataclasses import asdict, dataclass
from typing import Any

from ...text.printable import printable


#: Kinds of steps: embeddings, features, errors of dictionaries, MLPs without one, heads, skip connections, biases.
KINDS = ("token", "position", "feature", "error", "mlp", "head", "skip", "bias")
#: Biases, by the index of their step: the reader's own (with the norm before it), of attention (values, output, norms), of
#: a dictionary's output, and of the norm after an MLP.
BIASES = ("own", "attention", "decoder", "norm")


@dataclass(frozen=True)
class Step:
    """One step of a path: a writer to the activation that the step before it reads.

    Its contribution to the target is `activation * weight`, times the factors of the steps above it (see [`Path`]).

    Args:
        kind (`str`): One of [`KINDS`].
        layer (`int`): Layer that writes; -1 for embeddings; for the own bias of a reader, the layer that reads.
        position (`int`): Position of the writer: the token that a head attends to, otherwise the same as `to`.
        to (`int`): Position at which the step is read.
        index (`int`): Number of a feature or head, id of a token, index of a bias in [`BIASES`]; otherwise -1.
        dictionary (`str`, *optional*): Dictionary of a feature, error, skip connection or decoder bias.
        activation (`float`):
            Factor that depends on the prompt: activation of a feature, attention of a head, norm of an error or MLP;
            otherwise 1.
        weight (`float`):
            Effect on the reader per unit of activation. For a feature read by a feature it depends on weights, and on the
            scale of the norm before the reader; for a head it is the effect through its OV circuit.
        contribution (`float`): Contribution to the target of the path that ends in this step.
        token (`str`): Text of the token at `position`.
    """

    kind: str
    layer: int
    position: int
    to: int
    index: int
    dictionary: str | None
    activation: float
    weight: float
    contribution: float
    token: str

    @property
    def key(self) -> tuple:
        """Key of the component and place, equal for two steps with the same."""
        return self.kind, self.layer, self.position, self.to, self.index, self.dictionary

    @property
    def factor(self) -> float:
        """Factor of all steps below: the weight of a feature, the attention of a head."""
        return self.weight if self.kind == "feature" else self.activation

    @property
    def factors(self) -> list[tuple[str, float]]:
        """Activation and weight, by their names for this kind of step."""
        first = {"feature": "activation", "head": "attention", "error": "norm", "mlp": "norm"}.get(self.kind)
        second = ("OV" if self.kind == "head" else "weight", self.weight)
        return [second] if first is None else [(first, self.activation), second]

    def __str__(self):
        token = f'"{printable(self.token)}" ({self.position})'
        if self.kind == "head":
            return f"L{self.layer} head {self.index} from {token}"
        if self.kind in ("token", "position"):
            return f"{self.kind} {token}"
        if self.kind == "bias":
            return f"L{self.layer} {BIASES[self.index]} bias @ {token}"
        return f"L{self.layer} {f'f{self.index}' if self.kind == 'feature' else self.kind} @ {token}"


@dataclass(frozen=True)
class Path:
    """A path from a target down: `steps[0]` writes to the target, `steps[1]` to the input of `steps[0]`, and so on.

    `contribution` is the product of the `factor`s of all steps but the last and of activation and weight of the last.

    Args:
        target (`str`): Label of the target.
        steps (`tuple[Step, ...]`): Steps from the target down.
    """

    target: str
    steps: tuple[Step, ...]

    @property
    def contribution(self) -> float:
        """Signed contribution of the path to the target."""
        return self.steps[-1].contribution

    @property
    def key(self) -> tuple:
        return tuple(step.key for step in self.steps)

    @property
    def product(self) -> float:
        """The contribution as the product of the factors."""
        last = self.steps[-1]
        return math.prod(step.factor for step in self.steps[:-1]) * last.activation * last.weight

    def __len__(self):
        return len(self.steps)

    def __str__(self):
        return " <- ".join([printable(self.target), *map(str, self.steps)])

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {"contribution": self.contribution, "steps": [asdict(step) for step in self.steps]}
