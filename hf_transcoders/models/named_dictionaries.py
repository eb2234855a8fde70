"""The `dict` methods of modules that hold several dictionaries by name."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from transformers.utils import ModelOutput

from .modeling_transcoder import TranscoderModel, TranscoderOutput


@dataclass
class TranscoderSetOutput(ModelOutput):
    """
    Output of a [`TranscoderSet`].

    Args:
        loss (`torch.FloatTensor` of shape `()`, *optional*): Sum of the losses of the dictionaries.
        outputs (`dict[str, TranscoderOutput]`): Outputs by name of the dictionary.
    """

    loss: torch.FloatTensor | None = None
    outputs: dict[str, TranscoderOutput] | None = None


class NamedDictionaries:
    """A module that behaves like a `dict` of its dictionaries, which a subclass returns from `named()`."""

    def named(self) -> dict[str, TranscoderModel]:
        """The dictionaries by name."""
        raise NotImplementedError

    def __getitem__(self, name: str) -> TranscoderModel:
        named = self.named()
        if name not in named:
            raise KeyError(f"{name!r}; this set has {', '.join(named)}")
        return named[name]

    def __contains__(self, name: str) -> bool:
        return name in self.named()

    def __iter__(self) -> Iterator[str]:
        return iter(self.named())

    def __len__(self) -> int:
        return len(self.named())

    def keys(self) -> list[str]:
        return list(self.named())

    def values(self) -> list[TranscoderModel]:
        return list(self.named().values())

    def items(self) -> list[tuple[str, TranscoderModel]]:
        return list(self.named().items())

    @property
    def base_model_name_or_path(self) -> str | None:
        names = (dictionary.config.base_model_name_or_path for dictionary in self.values())
        return next((name for name in names if name is not None), None)


# It has the methods of a mapping; inheriting from Mapping would conflict with nn.Module.
Mapping.register(NamedDictionaries)  # pyright: ignore[reportAttributeAccessIssue]
