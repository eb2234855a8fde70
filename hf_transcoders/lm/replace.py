"""Write into a language model: splice in dictionaries, and ablate activations."""

import functools
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Literal

import torch
from torch import nn
from transformers import PreTrainedModel

from ..errors import TranscoderError
from .architectures import locate, width_at
from .hooks import Location, write_at
from .sites import Site, input_site, parse_sites
from .splicing import SplicedDictionary
from .threads import OfThread
from .wrappers import opens_on_model


class Replacement(Mapping):
    """Features of the last forward pass by output site, as [`replace`], [`splice`] and [`ablate`] yield them.

    Keys are [`Site`] objects or their text; the mapping is empty unless features were asked for.

    Threads that share it each have the features of their own last forward pass, and a mask of their own once they set one.

    Attributes:
        mask (`torch.BoolTensor` of shape `(batch, seq)`, *optional*):
            The positions where the replacement applies, all if `None`. Can be changed before each forward pass.
    """

    def __init__(self, mask: torch.Tensor | None):
        self._mask = OfThread(mask)
        self._features = OfThread({})

    @property
    def mask(self) -> torch.Tensor | None:
        return self._mask.get()

    @mask.setter
    def mask(self, mask: torch.Tensor | None):
        self._mask.set(mask)

    def __getitem__(self, site: Site | str) -> torch.Tensor:
        site = Site.parse(site)
        features = self._features.get()
        if site not in features:
            raise KeyError(f"No features at '{site}': ask for them with features=True, then call the model")
        return features[site]

    def __iter__(self) -> Iterator[Site]:
        return iter(self._features.get())

    def __len__(self):
        return len(self._features.get())

    def _keep_features(self, site, features):
        if not self._features.is_set:
            self._features.set({})
        self._features.get()[site] = features

    def _where_masked(self, new, true):
        mask = self.mask
        if mask is None:
            return new
        if mask.shape != true.shape[:-1]:
            raise TranscoderError(
                f"The mask has shape {tuple(mask.shape)}, but the model was called with {tuple(true.shape[:-1])} "
                "(batch, seq); set `.mask` to one bool per token of this call."
            )
        return torch.where(mask.to(true.device).unsqueeze(-1), new, true)


@opens_on_model
@contextmanager
def replace(
    base_model: PreTrainedModel,
    replacements: Mapping[str | Site, nn.Module | Sequence[nn.Module]],
    *,
    error: Literal["drop", "keep"] = "drop",
    mask: torch.Tensor | None = None,
    features: bool = False,
) -> Iterator[Replacement]:
    """Replace activations by dictionaries in every forward pass of `base_model` inside the `with` block.

    Each dictionary reads the activation at its `config.input_site` and its reconstruction is written at the output
    site. Several dictionaries work together: those further up read the stream that those below have changed.

    Model and dictionaries run in the mode they are in, training or evaluation. The block acts on the thread that entered it
    and on threads that are started inside it, as that of [`capture`] does.

    Args:
        base_model ([`~transformers.PreTrainedModel`]):
            A causal language model or its base model, plain or wrapped by PEFT, data parallelism or `torch.compile`.
        replacements (`Mapping[str | Site, torch.nn.Module or Sequence[torch.nn.Module]]`):
            Dictionary by output site; for the layers of a cross-layer transcoder all that write there, whose sum is written. A
            dictionary is called as `dictionary(inputs, output_features=...)` with `inputs` `(batch, seq, d_in)` in its own
            dtype, and returns `.reconstruction` `(batch, seq, d_out)` and `.features` `(batch, seq, num_features)`. A
            dictionary at several sites is called once in each forward pass, and `.reconstruction` may then be a mapping
            from site (`str`) to tensor.
        error (`"drop"` or `"keep"`, *optional*, defaults to `"drop"`):
            `"drop"` writes the reconstruction. `"keep"` adds what the reconstruction misses as a constant, so that
            the model computes exactly what it did before while gradients flow through the dictionary.
        mask (`torch.BoolTensor` of shape `(batch, seq)`, *optional*):
            Positions to replace; the others keep the true value. Can be changed through the yielded object.
        features (`bool`, *optional*, defaults to `False`):
            Keep the features of the last forward pass in the yielded mapping. They are dense, so they can be big.

    Returns:
        [`Replacement`]: a mapping from output site to features.

    Raises:
        [`TranscoderError`]: a site the model does not have, two dictionaries writing to one place, or a dictionary
            whose widths do not fit the model. Nothing has been attached to the model by then.
    """
    if error not in ("drop", "keep"):
        raise TranscoderError(f"error='{error}' is unknown; use 'drop' or 'keep'.")
    replacement = Replacement(mask)
    sites_of: dict[nn.Module, list[Site]] = {}
    reads: dict[nn.Module, tuple[Site, Location]] = {}
    located = [(site, locate(base_model, site)) for site in map(Site.parse, replacements)]
    for (site, location), given in zip(located, replacements.values(), strict=True):
        for dictionary in [given] if isinstance(given, nn.Module) else given:
            source = input_site(dictionary)
            reads[dictionary] = source, locate(base_model, source)
            config, who = dictionary.config, f"The dictionary for '{site}'"
            _check_width(base_model, *reads[dictionary], config.d_in, f"{who} reads")  # pyright: ignore[reportAttributeAccessIssue]
            _check_width(base_model, site, location, config.d_out, f"{who} writes")  # pyright: ignore[reportAttributeAccessIssue]
            sites_of.setdefault(dictionary, []).append(site)
    _check_writable(located)
    targets = dict(located)
    sums = {}
    for site in targets:
        # Writers act in the order in which they are attached.
        writers = [dictionary for dictionary, sites in sites_of.items() if site in sites]
        sums[site] = _Sum(replacement, site, writers, error)
    spliced = []
    for dictionary, sites in sites_of.items():
        work = _Reconstruction(replacement, dictionary, {site: sums[site] for site in sites}, features)
        written = {site: targets[site] for site in sites}
        spliced.append(SplicedDictionary(*reads[dictionary], written, work.compute, work.write))
    with ExitStack() as stack:
        for dictionary in spliced:
            dictionary.attach(stack)
        yield replacement


@opens_on_model
@contextmanager
def ablate(
    model: PreTrainedModel,
    sites: str | Site | Iterable[str | Site],
    value: float | torch.Tensor | Mapping[str | Site, float | torch.Tensor] = 0.0,
    mask: torch.Tensor | None = None,
) -> Iterator[Replacement]:
    """Set the activations at some sites to constants in every forward pass of `model` inside the `with` block.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            As in [`replace`].
        sites (`str`, [`Site`] or an iterable of them):
            Sites to write at.
        value (`float`, `torch.Tensor` or a mapping from site to either, *optional*, defaults to 0.0):
            Value to write: zero, a mean activation `(width)`, or anything that broadcasts to `(batch, seq, width)`.
        mask (`torch.BoolTensor` of shape `(batch, seq)`, *optional*):
            Positions to ablate; the others keep the true value. Can be changed through the yielded object.

    Returns:
        [`Replacement`]: an empty mapping that carries `.mask`.

    Raises:
        [`TranscoderError`]: a site the model does not have, or a value that does not fit it. Nothing has been
            attached to the model by then.
    """
    sites = parse_sites(sites)
    if isinstance(value, Mapping):
        values = {Site.parse(site): constant for site, constant in value.items()}
        if missing := [str(site) for site in sites if site not in values]:
            raise TranscoderError(f"`value` has no entry for {', '.join(missing)}; give one value per ablated site.")
    else:
        values = dict.fromkeys(sites, value)
    replacement = Replacement(mask)
    locations = {site: locate(model, site) for site in sites}
    constants = {site: torch.as_tensor(values[site]) for site in sites}
    for site, constant in constants.items():
        if constant.dim() > 0:
            _check_width(model, site, locations[site], constant.shape[-1], f"The value for '{site}' writes")
    _check_writable(locations.items())
    with ExitStack() as stack:
        for site, constant in constants.items():
            write_at(stack, locations[site], functools.partial(_write_constant, replacement, constant))
        yield replacement


def splice(
    base_model: PreTrainedModel,
    dictionaries: nn.Module | Iterable[nn.Module] | Mapping[str, nn.Module],
    *,
    error: Literal["drop", "keep"] = "keep",
    features: bool = True,
    mask: torch.Tensor | None = None,
):
    """[`replace`] with each dictionary at the output site of its own config; by default only to read the features.

    Args:
        base_model ([`~transformers.PreTrainedModel`]):
            As in [`replace`].
        dictionaries (`torch.nn.Module`, an iterable of them, or a mapping with them as values):
            Dictionaries to splice in.
        error, features, mask:
            As in [`replace`].

    Returns:
        A context manager that yields a [`Replacement`]: a mapping from output site to features.

    Raises:
        [`TranscoderError`]: as in [`replace`].

    Example:

    ```python
    >>> with splice(model, transcoder) as features:
    ...     model(**tokenizer("The capital of France is", return_tensors="pt"))
    ...     features["layers.8.mlp.out"].shape
    torch.Size([1, 5, 4608])
    ```
    """
    if isinstance(dictionaries, Mapping):
        dictionaries = dictionaries.values()
    elif not isinstance(dictionaries, Iterable):
        dictionaries = [dictionaries]
    return replace(base_model, writers_by_site(dictionaries), error=error, mask=mask, features=features)


def writers_by_site(dictionaries: Iterable[nn.Module]) -> dict[str, list[nn.Module]]:
    """Dictionaries by the sites that they write at: one for each site, or layers of one cross-layer transcoder.

    Args:
        dictionaries (`Iterable[torch.nn.Module]`): The dictionaries.

    Raises:
        [`TranscoderError`]: two dictionaries that do not belong together write at one site.
    """
    found: dict[str, list[nn.Module]] = {}
    for dictionary in dictionaries:
        for site in dictionary.config.output_sites:  # pyright: ignore[reportAttributeAccessIssue, reportGeneralTypeIssues]
            others = found.setdefault(site, [])
            group = getattr(dictionary, "group", None)
            if others and (group is None or any(other.group != group for other in others)):
                raise TranscoderError(f"Two dictionaries write to '{site}'; splice in one of them.")
            others.append(dictionary)
    return found


class _Reconstruction:
    """One spliced dictionary: its output in a forward pass, and its part of the sum at each of its sites."""

    def __init__(self, replacement, dictionary, sums, features):
        self.replacement = replacement
        self.dictionary = dictionary
        self.sums = sums
        self.features = features

    def compute(self, inputs):
        weight = next(self.dictionary.parameters(), inputs)
        output = self.dictionary(inputs.to(weight.device, weight.dtype), output_features=self.features)
        if self.features:
            for site, written in self.sums.items():
                if written.owner is self.dictionary:
                    self.replacement._keep_features(site, output.features)
        return output.reconstruction

    def write(self, site, reconstruction, value):
        part = reconstruction[str(site)] if isinstance(reconstruction, Mapping) else reconstruction
        return self.sums[site].add(self.dictionary, part, value)


class _Sum:
    """The sum of the writes of dictionaries at one site, which replaces the activation there."""

    def __init__(self, replacement, site, writers, error):
        self.replacement = replacement
        self.first, self.last = writers[0], writers[-1]
        self.error = error
        # The dictionary whose own site this is: its features are those of the site.
        self.owner = next((d for d in writers if getattr(d.config, "output_site", None) == str(site)), self.first)
        # State of the current forward pass in each thread.
        self.at_hand = threading.local()

    def add(self, dictionary, part, value):
        part = part.to(value.device)
        total = part if dictionary is self.first else self.at_hand.total + part
        if dictionary is not self.last:
            self.at_hand.total = total
            return value
        self.at_hand.total = None
        if self.error == "keep":
            # The same as total + (value - total).detach(), but without its rounding.
            total = value.detach() + (total - total.detach())
        return self.replacement._where_masked(total.to(value.dtype), value)


def _write_constant(replacement, constant, value):
    new = constant.to(value.device, value.dtype).expand_as(value)
    return replacement._where_masked(new, value)


def _check_writable(located: Iterable[tuple[Site, Location]]) -> None:
    """Refuse sites that cannot be written, before anything has been attached to the model."""
    places = {}
    for site, location in located:
        if site.point == "resid_mid":
            raise TranscoderError(
                f"'{site}' can be read but not written: the model has no module that passes it on; write to "
                f"'layers.{site.layer}.attn.branch' instead."
            )
        if location.place in places:
            raise TranscoderError(
                f"'{places[location.place]}' and '{site}' are one place in this model; write to one."
            )
        places[location.place] = site


def _check_width(model, site, location, width, who):
    expected = width_at(model, site, location)
    if expected is not None and width != expected:
        raise TranscoderError(f"{who} {width} values at '{site}', but this model has {expected} there.")
