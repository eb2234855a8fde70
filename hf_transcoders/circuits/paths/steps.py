"""Steps and paths: from what is explained down through features and heads to what wrote it."""

import math
from dataclasses import asdict, dataclass
from typing import Any

from ...text.printable import printable


#: What a step can be: embeddings, features, what dictionaries miss, MLPs without one, heads, skip connections, biases.
KINDS = ("token", "position", "feature", "error", "mlp", "head", "skip", "bias")
#: What the index of a bias says: of the reader itself (its own bias, and that of the norm before it), of attention
#: (values, output, norms), of a dictionary's output, of the norm behind an MLP.
BIASES = ("own", "attention", "decoder", "norm")


@dataclass(frozen=True)
class Step:
    """One step of a path: something that wrote to what the step before it reads.

    What it adds to the target is `activation * weight`, times the factors of the steps above it (see [`Path`]).

    Args:
        kind (`str`): One of [`KINDS`].
        layer (`int`): Layer that writes; -1 for embeddings; for the own bias of a reader, the layer that reads.
        position (`int`): Token it comes from: where a head looked, otherwise where it is read too.
        to (`int`): Token at which it is read.
        index (`int`): Number of a feature or head, id of a token, place in [`BIASES`] of a bias; otherwise -1.
        dictionary (`str`, *optional*): Of a feature, error, skip connection or decoder bias.
        activation (`float`):
            What depends on the prompt: activation of a feature, attention of a head, norm of an error or MLP; otherwise 1.
        weight (`float`):
            What the reader makes of it per unit. For a feature read by a feature it depends on weights, and on the scale
            of the norm before the reader; for a head it is what its OV circuit carries over.
        contribution (`float`): What the path that ends in this step adds to the target.
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
        """What makes two steps the same component at the same place."""
        return self.kind, self.layer, self.position, self.to, self.index, self.dictionary

    @property
    def factor(self) -> float:
        """What everything below this step is multiplied with: the weight of a feature, the attention of a head."""
        return self.weight if self.kind == "feature" else self.activation

    @property
    def factors(self) -> list[tuple[str, float]]:
        """Activation and weight by the names they have for this kind of step."""
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
    """A path from a target down: `steps[0]` adds to the target, `steps[1]` to what `steps[0]` reads, and so on.

    `contribution` is the product of the `factor`s of all steps but the last and of activation and weight of the last.

    Args:
        target (`str`): What is explained.
        steps (`tuple[Step, ...]`): From the target down.
    """

    target: str
    steps: tuple[Step, ...]

    @property
    def contribution(self) -> float:
        """What the path adds to the target, with its sign."""
        return self.steps[-1].contribution

    @property
    def key(self) -> tuple:
        return tuple(step.key for step in self.steps)

    @property
    def product(self) -> float:
        """The contribution again, out of the factors."""
        last = self.steps[-1]
        return math.prod(step.factor for step in self.steps[:-1]) * last.activation * last.weight

    def __len__(self):
        return len(self.steps)

    def __str__(self):
        return " <- ".join([printable(self.target), *map(str, self.steps)])

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON."""
        return {"contribution": self.contribution, "steps": [asdict(step) for step in self.steps]}
