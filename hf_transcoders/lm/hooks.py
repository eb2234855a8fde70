"""Hooks at a site: the one place that knows how a module takes its input and returns its output."""

import inspect
from collections.abc import Callable
from contextlib import ExitStack

import torch

from ..errors import TranscoderError
from .architectures import Location


class _SiteHook:
    """Shows the value at a location to a function, and puts the function's answer in its place if it `writes`."""

    def __init__(self, location: Location, function: Callable, writes: bool):
        self.location = location
        self.function = function
        self.writes = writes
        self.batch_shape = None

    def remember_batch_shape(self, block, args, kwargs):
        given = _first_input(block, args, kwargs)
        given = kwargs.get("inputs_embeds") if given is None else given
        self.batch_shape = None
        if isinstance(given, torch.Tensor):
            self.batch_shape = given.shape[:-1] if given.is_floating_point() else given.shape

    def apply(self, value):
        if not isinstance(value, torch.Tensor):
            raise TranscoderError(
                f"{type(self.location.module).__name__} has a {type(value).__name__} as its {self.location.side}put, "
                "not a tensor; choose a site inside or around it."
            )
        flat = self.batch_shape is not None and value.shape[:-1].numel() == self.batch_shape.numel()
        flat = flat and value.dim() == 2 and value.is_floating_point()
        shaped = value.reshape(*self.batch_shape, value.shape[-1]) if flat else value
        scale, copied = self.location.scale, self.location.copied
        if scale != 1:
            shaped = shaped * scale
        elif copied:
            shaped = shaped.clone()
        result = self.function(shaped)
        if not self.writes:
            return None
        result = result.reshape(value.shape)
        if scale != 1:
            return result / scale
        # What is written may be one tensor expanded, or kept by whoever wrote it.
        return result.clone() if copied else result


class _InputHook(_SiteHook):
    def __call__(self, module, args, kwargs):
        new = self.apply(_first_input(module, args, kwargs))
        if not self.writes:
            return None
        if args:
            return (new, *args[1:]), kwargs
        return args, {**kwargs, _first_parameter(module): new}


class _OutputHook(_SiteHook):
    def __call__(self, module, args, output):
        if not isinstance(output, tuple):
            return self.apply(output)
        new = self.apply(output[0])
        return (new, *output[1:]) if self.writes else None


def read_at(stack: ExitStack, location: Location, function: Callable[[torch.Tensor], None]):
    """Call `function` with the value at `location`, `(batch, seq, width)`, in every forward until `stack` closes."""
    _attach(stack, location, function, writes=False)


def write_at(stack: ExitStack, location: Location, function: Callable[[torch.Tensor], torch.Tensor]):
    """Replace the value at `location` by `function(value)` in every forward until `stack` closes.

    Whoever reads there sees the new value, no matter which of the two was attached first; of several writers the one
    attached last has the last word.
    """
    _attach(stack, location, function, writes=True)


def hide_forward(stack: ExitStack, module: torch.nn.Module, forward: Callable):
    """Let calls of `module` run `forward` instead of its own, until `stack` closes."""
    hide_method(stack, module, "forward", forward)


def hide_method(stack: ExitStack, module: torch.nn.Module, name: str, method: Callable):
    """Let `method` answer to `module.<name>` instead of the module's own, until `stack` closes."""
    # An instance attribute hides the class's; a module may already have one (accelerate's hooks set `forward`).
    earlier = module.__dict__.get(name)

    def restore():
        if earlier is None:
            delattr(module, name)
        else:
            setattr(module, name, earlier)

    stack.callback(restore)
    setattr(module, name, method)


def _attach(stack, location, function, writes):
    if location.side == "in":
        hook = _InputHook(location, function, writes)
        handle = location.module.register_forward_pre_hook(hook, with_kwargs=True)
        hooks = location.module._forward_pre_hooks
    else:
        hook = _OutputHook(location, function, writes)
        handle = location.module.register_forward_hook(hook)
        hooks = location.module._forward_hooks
    stack.callback(handle.remove)
    if location.block is not None:
        shape_handle = location.block.register_forward_pre_hook(hook.remember_batch_shape, with_kwargs=True)
        stack.callback(shape_handle.remove)
    if writes:
        for identifier, other in list(hooks.items()):
            if isinstance(other, _SiteHook) and not other.writes:
                hooks.move_to_end(identifier)


def _first_input(module, args, kwargs):
    return args[0] if args else kwargs.get(_first_parameter(module))


def _first_parameter(module):
    return next(iter(inspect.signature(module.forward).parameters))
