"""Writing into a base model: dictionaries in place of its modules, and ablations."""

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Literal

import torch
from torch import nn
from transformers import PreTrainedModel

from ..errors import TranscoderError
from .architectures import locate, site_width
from .hooks import read_at, write_at
from .sites import Site, parse_sites
from .threads import OfThread
from .wrappers import opens_on_model


class Replacement(Mapping):
    """What [`replace`], [`splice`] and [`ablate`] yield: features of the last forward, by output site.

    Keys are [`Site`] objects or their text; the mapping is empty unless features were asked for.

    Threads that share it each have the features of their own last forward, and a mask of their own once they set one.

    Attributes:
        mask (`torch.BoolTensor` of shape `(batch, seq)`, *optional*):
            The positions where the replacement applies, all if `None`. May be set anew before each forward.
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
    model: PreTrainedModel,
    replacements: Mapping[str | Site, nn.Module],
    *,
    error: Literal["drop", "keep"] = "drop",
    mask: torch.Tensor | None = None,
    features: bool = False,
) -> Iterator[Replacement]:
    """Put dictionaries in place of activations in every forward of `model` inside the `with` block.

    Each dictionary reads the activation at its `config.input_site` and its reconstruction is written at the output
    site. Several dictionaries work together: those further up read the stream that those below have changed.

    Model and dictionaries run in the mode they are in, training or evaluation. The block acts on the thread that entered it
    and on threads that are started inside it, as that of [`capture`] does.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            A causal language model or its base model, plain or wrapped by PEFT, data parallelism or `torch.compile`.
        replacements (`Mapping[str | Site, torch.nn.Module]`):
            Output site to dictionary. A dictionary is called as `dictionary(inputs, output_features=...)` with
            `inputs` `(batch, seq, d_in)` in its own dtype, and answers with `.reconstruction` `(batch, seq, d_out)`
            and `.features` `(batch, seq, num_features)`.
        error (`"drop"` or `"keep"`, *optional*, defaults to `"drop"`):
            `"drop"` writes the reconstruction. `"keep"` adds what the reconstruction misses as a constant, so that
            the model computes exactly what it did before while gradients flow through the dictionary.
        mask (`torch.BoolTensor` of shape `(batch, seq)`, *optional*):
            Positions to replace; the others keep the true value. Can be changed through the yielded object.
        features (`bool`, *optional*, defaults to `False`):
            Keep the features of the last forward in the yielded mapping. They are dense, so they can be big.

    Returns:
        [`Replacement`]: a mapping from output site to features.

    Raises:
        [`TranscoderError`]: a site the model does not have, two dictionaries writing to one place, or a dictionary
            whose widths do not fit the model. Nothing has been attached to the model by then.
    """
    if error not in ("drop", "keep"):
        raise TranscoderError(f"error='{error}' is unknown; use 'drop' or 'keep'.")
    replacement = Replacement(mask)
    reads, writes = [], {}
    for site, dictionary in replacements.items():
        site, source = Site.parse(site), Site.parse(dictionary.config.input_site)  # pyright: ignore[reportAttributeAccessIssue]
        _check_width(model, source, dictionary.config.d_in, f"The dictionary for '{site}' reads")  # pyright: ignore[reportAttributeAccessIssue]
        _check_width(model, site, dictionary.config.d_out, f"The dictionary for '{site}' writes")  # pyright: ignore[reportAttributeAccessIssue]
        read, written = locate(model, source), locate(model, site)
        spliced = _Spliced(replacement, site, source, dictionary, error, features, read.scale / written.scale)
        if read.place == written.place:
            writes[site] = spliced.rewrite
        else:
            reads.append((source, spliced.read))
            writes[site] = spliced.write
    with _edited(model, reads, writes):
        yield replacement


@opens_on_model
@contextmanager
def ablate(
    model: PreTrainedModel,
    sites: str | Site | Iterable[str | Site],
    value: float | torch.Tensor | Mapping[str | Site, float | torch.Tensor] = 0.0,
    mask: torch.Tensor | None = None,
) -> Iterator[Replacement]:
    """Hold the activations at some sites constant in every forward of `model` inside the `with` block.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            As in [`replace`].
        sites (`str`, [`Site`] or an iterable of them):
            Where to write.
        value (`float`, `torch.Tensor` or a mapping from site to either, *optional*, defaults to 0.0):
            What to write: zero, a mean activation `(width)`, or anything that broadcasts to `(batch, seq, width)`.
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
    writes = {}
    for site in sites:
        constant = torch.as_tensor(values[site])
        if constant.dim() > 0:
            _check_width(model, site, constant.shape[-1], f"The value for '{site}' writes")
        writes[site] = _Constant(replacement, constant).write
    with _edited(model, [], writes):
        yield replacement


def splice(
    model: PreTrainedModel,
    dictionaries: nn.Module | Iterable[nn.Module] | Mapping[str, nn.Module],
    *,
    error: Literal["drop", "keep"] = "keep",
    features: bool = True,
    mask: torch.Tensor | None = None,
):
    """[`replace`] with each dictionary at the output site of its own config; by default only to read the features.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            As in [`replace`].
        dictionaries (`torch.nn.Module`, an iterable of them, or a mapping with them as values):
            What to splice in.
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
    replacements = {}
    for dictionary in dictionaries:
        site = Site.parse(dictionary.config.output_site)  # pyright: ignore[reportAttributeAccessIssue]
        if site in replacements:
            raise TranscoderError(f"Two dictionaries write to '{site}'; splice in one of them.")
        replacements[site] = dictionary
    return replace(model, replacements, error=error, mask=mask, features=features)


class _Spliced:
    """One dictionary at work: what it reads on its way through the forward, and what it writes."""

    def __init__(self, replacement, site, source, dictionary, error, features, ratio):
        self.replacement = replacement
        self.site = site
        self.source = source
        self.dictionary = dictionary
        self.error = error
        self.features = features
        # Of the value at the source to that at the site, where both are one place.
        self.ratio = ratio
        # Of the forward pass at hand in each thread.
        self.at_hand = threading.local()

    def read(self, inputs):
        self.at_hand.inputs = inputs

    def write(self, value):
        inputs, self.at_hand.inputs = getattr(self.at_hand, "inputs", None), None
        if inputs is None:
            raise TranscoderError(
                f"A dictionary that writes to '{self.site}' cannot read '{self.source}': the model reaches that later."
            )
        return self._reconstruct(inputs, value)

    def rewrite(self, value):
        return self._reconstruct(value if self.ratio == 1 else value * self.ratio, value)

    def _reconstruct(self, inputs, value):
        weight = next(self.dictionary.parameters(), inputs)
        output = self.dictionary(inputs.to(weight.device, weight.dtype), output_features=self.features)
        if self.features:
            self.replacement._keep_features(self.site, output.features)
        new = output.reconstruction.to(value.device)
        if self.error == "keep":
            # The same as new + (value - new).detach(), but without its rounding.
            new = value.detach() + (new - new.detach())
        return self.replacement._where_masked(new.to(value.dtype), value)


class _Constant:
    def __init__(self, replacement, constant):
        self.replacement = replacement
        self.constant = constant

    def write(self, value):
        new = self.constant.to(value.device, value.dtype).expand_as(value)
        return self.replacement._where_masked(new, value)


@contextmanager
def _edited(model, reads, writes: Mapping[Site, Callable]):
    """Attach the readers and writers of one replacement, once it is certain that all of them can be."""
    targets = {}
    for site in writes:
        if site.point == "resid_mid":
            raise TranscoderError(
                f"'{site}' can be read but not written: the model has no module that passes it on; write to "
                f"'layers.{site.layer}.attn.branch' instead."
            )
        place = locate(model, site).place
        if place in targets:
            raise TranscoderError(f"'{targets[place]}' and '{site}' are one place in this model; write to one.")
        targets[place] = site
    with ExitStack() as stack:
        for site in targets.values():
            write_at(stack, locate(model, site), writes[site])
        for site, read in reads:
            read_at(stack, locate(model, site), read)
        yield


def _check_width(model, site, width, who):
    expected = site_width(model, site)
    if expected is not None and width != expected:
        raise TranscoderError(f"{who} {width} values at '{site}', but this model has {expected} there.")
