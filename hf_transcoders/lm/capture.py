"""Reading activations of a base model, without running more of it than they need."""

import functools
import inspect
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager

import torch
from transformers import PreTrainedModel

from ..errors import TranscoderError
from .architectures import locate
from .hooks import hide_forward, read_at
from .sites import Site, parse_sites


class Activations(Mapping):
    """The activations of the last forward, by site: `activations["layers.8.mlp.in"]`, `(batch, seq, width)`.

    Keys are [`Site`] objects or their text. Tensors are the model's own, not detached. Each forward replaces them.
    """

    def __init__(self, sites: list[Site], stop: bool):
        self._sites = sites
        self._stop = stop
        self._values = {}

    def __getitem__(self, site: Site | str) -> torch.Tensor:
        site = Site.parse(site)
        if site not in self._values:
            raise KeyError(f"'{site}' was not reached by the last forward, or is not among the captured sites")
        return self._values[site]

    def of_tokens(self, site: Site | str, shape: torch.Size) -> torch.Tensor:
        """The activations at a site, once it is certain that they are of the tokens `(batch, seq)` that were given.

        Raises:
            [`TranscoderError`]: the module works on something else.
        """
        value = self[site]
        if value.shape[:-1] != shape:
            raise TranscoderError(
                f"The activations at '{site}' have the shape {tuple(value.shape)} for tokens of the shape {tuple(shape)}, so "
                "they are not one vector for each token: choose another module."
            )
        return value

    def __iter__(self) -> Iterator[Site]:
        return iter(self._values)

    def __len__(self):
        return len(self._values)

    def _has_enough(self):
        return self._stop and len(self._values) == len(self._sites)


class _Enough(Exception):
    """Ends a forward in which every capture has what it wants."""


class _Running(threading.local):
    """The captures whose forward is running in this thread, outermost call first."""

    def __init__(self):
        self.captures: list[Activations] = []


_running = _Running()


@contextmanager
def capture(
    model: PreTrainedModel, sites: str | Site | Iterable[str | Site], stop: bool = True
) -> Iterator[Activations]:
    """Read the activations at some sites in every forward of `model` inside the `with` block.

    Enter the block once and call the model as often as you like: each call replaces the activations. Within the block
    `use_cache` is `False` unless the call says otherwise, or passes a cache.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            A causal language model or its base model, in eval mode (dropout between a module and the residual stream
            is not part of any site).
        sites (`str`, [`Site`] or an iterable of them):
            Where to read.
        stop (`bool`, *optional*, defaults to `True`):
            End the forward as soon as every site has been reached; `model(...)` then returns `None`. Nested captures
            end it once all of them have what they want, so one with `stop=False` lets every forward run to its end.

    Returns:
        [`Activations`]: a mapping from site to tensor, empty until the first forward.

    Raises:
        [`TranscoderError`]: a site is misspelt, or the model does not have it.

    Example:

    ```python
    >>> with capture(model, ["layers.8.mlp.in", "layers.8.mlp.out"]) as activations:
    ...     model(**tokenizer("The capital of France is", return_tensors="pt"))
    ...     activations["layers.8.mlp.in"].shape
    torch.Size([1, 5, 576])
    ```
    """
    locations = {site: locate(model, site) for site in parse_sites(sites)}
    activations = Activations(list(locations), stop)

    def read(site, value):
        activations._values[site] = value
        if _running.captures and all(running._has_enough() for running in _running.captures):
            raise _Enough

    with ExitStack() as stack:
        for site, location in locations.items():
            read_at(stack, location, functools.partial(read, site))
        _wrap_forward(stack, model, activations)
        yield activations


def _wrap_forward(stack, model, activations):
    """Make `model(...)` start `activations` afresh and return `None` when it ended early, until `stack` closes."""
    forward = model.forward
    parameters = list(inspect.signature(forward).parameters)
    use_cache_position = parameters.index("use_cache") if "use_cache" in parameters else -1

    @functools.wraps(forward)
    def forward_until_captured(*args, **kwargs):
        if len(args) <= use_cache_position and kwargs.get("past_key_values") is None:
            kwargs.setdefault("use_cache", False)
        activations._values.clear()
        _running.captures.append(activations)
        try:
            return forward(*args, **kwargs)
        except _Enough:
            # Only the outermost call can answer None: the code between two nested calls would trip over it.
            if len(_running.captures) > 1:
                raise
            return None
        finally:
            _running.captures.pop()

    hide_forward(stack, model, forward_until_captured)
