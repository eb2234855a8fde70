"""What a format module takes and gives: plain data between files and models."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from ..errors import TranscoderError
from ..text.printable import printable
from .tensor_files import LazyTensor


class Norm(NamedTuple):
    """
    What a norm layer does after it has scaled its input.

    Args:
        gain (`torch.Tensor` of shape `(width,)`): Factor on each dimension.
        bias (`torch.Tensor` of shape `(width,)`): Bias of each dimension.
        centers (`bool`): Whether the mean is subtracted first, as LayerNorm does.
    """

    gain: torch.Tensor
    bias: torch.Tensor
    centers: bool


@dataclass(frozen=True)
class Given:
    """
    What the user says about a dictionary whose files do not say it.

    Args:
        base_model (`str`, *optional*): Name or path of the language model.
        base_fields (`dict[str, Any]`, *optional*): Fields of a configuration that the loaded language model determines.
        norm_of (`Callable[[str], Norm]`, *optional*):
            The norm of a site of the loaded language model: the one in front of `mlp.in` and `attn.in`, and for a site of the
            residual stream the one that reads it.
        input_site (`str`, *optional*), output_site (`str`, *optional*): Where the dictionary reads and writes.
        folded (`bool`, *optional*):
            Whether the language model had the gains of its norms folded into the next weights, and centered weights, as
            TransformerLens does by default.
        scaling_factor (`float`, *optional*): Factor on the inputs that the files leave out.
        k (`int`, *optional*): Active features per token of TopK.
        complete (`bool`, *optional*, defaults to `True`):
            Whether what neither the files nor the user say is asked for. Without, the tensors may mean something else; for
            descriptions.
    """

    base_model: str | None = None
    base_fields: dict[str, Any] | None = None
    norm_of: Callable[[str], Norm] | None = None
    input_site: str | None = None
    output_site: str | None = None
    folded: bool | None = None
    scaling_factor: float | None = None
    k: int | None = None
    complete: bool = True


@dataclass
class ForeignDictionary:
    """
    One dictionary of another library.

    Args:
        fields (`dict[str, Any]`): Fields of a `TranscoderConfig`, as far as the files determine them.
        tensors (`dict[str, LazyTensor]`): Native name -> tensor in the native orientation.
        facts (`dict[str, Any]`, *optional*): What else the files say of where the dictionary comes from.
    """

    fields: dict[str, Any]
    tensors: dict[str, LazyTensor]
    facts: dict[str, Any] = field(default_factory=dict)


def setting(settings: Mapping[str, Any], name: str, kind: type, place: str, default: Any = ...) -> Any:
    """
    A value of a configuration file, checked for its type.

    Args:
        settings (`Mapping[str, Any]`): What the file holds.
        name (`str`): Name of the value.
        kind (`type`): Type of the value; a whole number is also a `float`.
        place (`str`): The file, for messages.
        default (`Any`, *optional*): What an absent or null value means. Without one, the value is required.
    """
    value = settings.get(name)
    if value is None:
        if default is ...:
            raise TranscoderError(f"{printable(place)} lacks `{name}`: copy or download the dictionary again.")
        return default
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind:
        raise TranscoderError(
            f"`{name}` in {printable(place)} is {printable(repr(value))[:60]}, but must be of type {kind.__name__}: copy or "
            "download the dictionary again."
        )
    return value


def above_zero(threshold: LazyTensor) -> LazyTensor:
    """Thresholds for peers that rectify first: below zero, theirs act as zero."""
    return threshold.then(lambda values: values.float().clamp(min=0), torch.float32)
