"""Run a dictionary inside a model: it reads at one site of a forward pass, then writes at one or more."""

import functools
import threading
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Generic, TypeVar

import torch

from ..errors import TranscoderError
from .hooks import Location, read_at, write_at
from .sites import Site


T = TypeVar("T")


class SplicedDictionary(Generic[T]):
    """The hooks of one dictionary.

    Args:
        source ([`Site`]), read_location ([`Location`]): The site that the dictionary reads.
        locations (`Mapping[Site, Location]`): The sites that it writes at.
        compute (`Callable[[torch.Tensor], T]`): Called with the value at the source, once in each forward pass.
        write (`Callable[[Site, T, torch.Tensor], torch.Tensor]`):
            Called with a target, the result of `compute` and the value at the target; returns the new value there.
    """

    def __init__(
        self,
        source: Site,
        read_location: Location,
        locations: Mapping[Site, Location],
        compute: Callable[[torch.Tensor], T],
        write: Callable[[Site, T, torch.Tensor], torch.Tensor],
    ):
        self.source = source
        self.read_location = read_location
        self.locations = locations
        self.compute = compute
        self.write = write
        # State of the current forward pass in each thread.
        self.at_hand = threading.local()

    def attach(self, stack: ExitStack) -> None:
        """Read and write in every forward pass until `stack` closes."""
        for site, location in self.locations.items():
            write_at(stack, location, functools.partial(self._write, site))
        # A value that is both read and written is read by its writer.
        if all(location.place != self.read_location.place for location in self.locations.values()):
            read_at(stack, self.read_location, self._read)

    def _read(self, inputs):
        self.at_hand.inputs, self.at_hand.missing = inputs, len(self.locations)

    def _write(self, site, value):
        location, at_hand = self.locations[site], self.at_hand
        if location.place == self.read_location.place:
            ratio = self.read_location.scale / location.scale
            self._read(value if ratio == 1 else value * ratio)
        missing = getattr(at_hand, "missing", 0)
        if missing == 0:
            raise TranscoderError(
                f"A dictionary that writes to '{site}' cannot read '{self.source}': the model reaches that later, or not "
                "at all."
            )
        if missing == len(self.locations):
            at_hand.computed = self.compute(at_hand.inputs)
        computed = at_hand.computed
        at_hand.missing = missing - 1
        if at_hand.missing == 0:
            at_hand.inputs = at_hand.computed = None
        return self.write(site, computed, value)
