"""Edits of single features."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from ...errors import TranscoderError


KINDS = ("ablate", "set", "scale", "steer", "patch")


@dataclass(frozen=True, eq=False)
class FeatureEdit:
    """A change to the activation of one feature at some positions.

    | `kind`     | new activation                                                        |
    |------------|-----------------------------------------------------------------------|
    | `"ablate"` | 0                                                                     |
    | `"set"`    | `value`                                                               |
    | `"scale"`  | `value` times the old one                                             |
    | `"steer"`  | the old one plus `value`                                              |
    | `"patch"`  | `value`, one number for each position: those of another prompt        |

    Args:
        dictionary (`str`):
            Name of the dictionary in its set, or its output site.
        feature (`int`):
            Number of the feature.
        position (`int`, `slice`, a list of `int`, or `"all"`):
            Positions of the edit. They count the tokens of each row without the padding that its `attention_mask` marks; negative
            ones count from the end of the prompt. An `int` lies inside the prompt. A slice also goes on over tokens that `generate` adds:
            `slice(k, None)` is everything from position k, `slice(prompt_length, None)` the new tokens alone, and
            `"all"` is `slice(None)`.
        kind (`"ablate"`, `"set"`, `"scale"`, `"steer"` or `"patch"`, *optional*, defaults to `"ablate"`):
            Kind of edit, as in the table.
        value (`float`, or a list or tensor of shape `(positions,)` for `"patch"`, *optional*):
            In units of the activation; a factor for `"scale"`. A patch needs as many numbers as `position` selects in the
            prompt, in this order, and does not reach new tokens.

    Raises:
        [`TranscoderError`]: an unknown kind, or a value or position that does not fit it.

    Example:

    ```python
    >>> FeatureEdit("layers.8.mlp.transcoder", 1234, position=-1)
    >>> FeatureEdit("layers.8.mlp.out", 1234, position=slice(5, None), kind="steer", value=4.0)
    ```
    """

    dictionary: str
    feature: int
    position: int | slice | Sequence[int] | Literal["all"]
    kind: Literal["ablate", "set", "scale", "steer", "patch"] = "ablate"
    value: float | Sequence[float] | torch.Tensor | None = None

    def __post_init__(self):
        if self.kind not in KINDS:
            raise TranscoderError(f"kind='{self.kind}' is unknown; use {', '.join(KINDS[:-1])} or {KINDS[-1]}.")
        if (self.kind == "ablate") != (self.value is None):
            raise TranscoderError(
                f"An edit of kind '{self.kind}' takes {'no value' if self.kind == 'ablate' else 'a value'}: "
                f"{'leave it out' if self.kind == 'ablate' else 'give one'}, or choose another kind."
            )
        if self.kind == "patch":
            numbers = torch.as_tensor(self.value, dtype=torch.float32)
            fits = numbers.dim() == 1 and bool(numbers.isfinite().all())
        else:
            fits = self.value is None or (isinstance(self.value, (int, float)) and math.isfinite(self.value))
        if not fits:
            raise TranscoderError(
                f"The value of an edit of kind '{self.kind}' must be "
                f"{'a list of finite numbers, one for each position' if self.kind == 'patch' else 'one finite number'}."
            )
        if not _is_position(self.position):
            raise TranscoderError(
                f"{self.position!r} is not a position: give a whole number, a list of them, a slice with a positive step, "
                "or 'all'."
            )

    def __str__(self):
        return f"{self.kind} feature {self.feature} of '{self.dictionary}' at {self.position}"

    @property
    def factor(self) -> float:
        """The new activation is `factor` times the old one plus something that does not depend on it."""
        return {"scale": self.value, "steer": 1.0}.get(self.kind, 0.0)


def _is_position(position):
    if isinstance(position, slice):
        bounds = (position.start, position.stop, position.step)
        return all(bound is None or _is_index(bound) for bound in bounds) and (position.step or 1) > 0
    if isinstance(position, str):
        return position == "all"
    return _is_index(position) or (
        isinstance(position, Sequence) and len(position) > 0 and all(map(_is_index, position))
    )


def _is_index(number):
    return isinstance(number, int) and not isinstance(number, bool)
