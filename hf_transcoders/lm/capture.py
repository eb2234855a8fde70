"""Read activations of a language model, and run no more of it than they need."""

import functools
import inspect
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager

import torch
from transformers import PreTrainedModel

from ..errors import TranscoderError
from .architectures import locate
from .hooks import read_at, wrap_forward
from .sites import Site, parse_sites
from .threads import OfThread
from .wrappers import opens_on_model


class Activations(Mapping):
    """The activations of the last forward pass, by site: `activations["layers.8.mlp.in"]`, `(batch, seq, width)`.

    Keys are [`Site`] objects or their text. Tensors are the model's own, not detached. Each forward replaces them.
    Threads that share it each have those of their own last forward pass.
    """

    def __init__(self, sites: list[Site], stop: bool):
        self._sites = sites
        self._stop = stop
        self._values = OfThread({})

    def __getitem__(self, site: Site | str) -> torch.Tensor:
        site = Site.parse(site)
        values = self._values.get()
        if site not in values:
            raise KeyError(f"'{site}' was not reached by the last forward pass, or is not among the captured sites")
        return values[site]

    def of_tokens(self, site: Site | str, shape: torch.Size) -> torch.Tensor:
        """The activations at a site, after a check that they belong to the tokens `(batch, seq)` that were given.

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
        return iter(self._values.get())

    def __len__(self):
        return len(self._values.get())

    def _begin(self):
        self._values.set({})

    def _keep(self, site, value):
        if not self._values.is_set:
            self._begin()
        self._values.get()[site] = value

    def _has_enough(self):
        return self._stop and len(self) == len(self._sites)


class _Enough(Exception):
    """Ends a forward pass in which every capture is complete."""


class _Running(threading.local):
    """Captures of the forward passes that run in this thread, outermost call first."""

    def __init__(self):
        self.captures: list[Activations] = []


_running = _Running()


@opens_on_model
@contextmanager
def capture(
    model: PreTrainedModel, sites: str | Site | Iterable[str | Site], stop: bool = True
) -> Iterator[Activations]:
    """Read the activations at some sites in every forward pass of `model` inside the `with` block.

    Enter the block once and call the model as often as you like: each call replaces the activations. Within the block
    `use_cache` is `False` unless the call says otherwise, or passes a cache. A compiled model runs uncompiled in it.

    The block acts on the thread that entered it, and on threads that are started inside it and tasks that are submitted to
    a `ThreadPoolExecutor` there, which share it; each of them has the activations of its own last forward pass. Other threads
    have blocks of their own, or call the model as it is. Blocks may be left in any order.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            A causal language model or its base model, plain or wrapped by PEFT, data parallelism or `torch.compile`.
            It runs in the mode it is in: call `model.eval()` first, unless the dropout of training is wanted (that
            between a module and the residual stream is not part of any site).
        sites (`str`, [`Site`] or an iterable of them):
            Where to read.
        stop (`bool`, *optional*, defaults to `True`):
            End the forward pass as soon as every site has been reached; `model(...)` then returns `None`. Nested captures
            end it once all of them have what they want, so one with `stop=False` lets every forward pass run to its end.

    Returns:
        [`Activations`]: a mapping from site to tensor, empty until the first forward pass.

    Raises:
        [`TranscoderError`]: a site is misspelled, or the model does not have it.

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
        activations._keep(site, value)
        if _running.captures and all(running._has_enough() for running in _running.captures):
            raise _Enough

    with ExitStack() as stack:
        for site, location in locations.items():
            read_at(stack, location, functools.partial(read, site))
        _wrap_forward(stack, model, activations)
        yield activations


def _wrap_forward(stack, model, activations):
    """Make `model(...)` start `activations` afresh and return `None` when it ended early, until `stack` closes."""
    parameters = list(inspect.signature(model.forward).parameters)
    use_cache_position = parameters.index("use_cache") if "use_cache" in parameters else -1

    def forward_until_captured(forward, *args, **kwargs):
        if len(args) <= use_cache_position and kwargs.get("past_key_values") is None:
            kwargs.setdefault("use_cache", False)
        activations._begin()
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

    wrap_forward(stack, model, forward_until_captured)
