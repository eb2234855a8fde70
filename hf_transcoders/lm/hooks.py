"""Hooks and method wrappers: everything that is attached to a model is attached here.

Hooks and wrappers act on the forward passes of their [`Scope`]; in other threads the model stays unchanged.
"""

import functools
import inspect
import threading
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from ..errors import TranscoderError
from .threads import Scope, attaching


@dataclass(frozen=True)
class Location:
    """A [`Site`] found in a model.

    Args:
        module (`torch.nn.Module`):
            The module whose input or output is the value.
        side (`"in"` or `"out"`):
            Which of the two: its first input, or its output (the first element where that is a tuple).
        block (`torch.nn.Module`, *optional*):
            Set where `module` sees batch and positions as one axis, or may do so: a module whose input still has both,
            the block or the decoder.
        scale (`float`, *optional*, defaults to 1.0):
            The value is the module's times this.
        copied (`bool`, *optional*, defaults to `False`):
            Whether the model may change the module's tensor in place later, so that the value has to be a copy.
    """

    module: nn.Module
    side: Literal["in", "out"]
    block: nn.Module | None = None
    scale: float = 1.0
    copied: bool = False

    @property
    def place(self) -> tuple[nn.Module, str]:
        """A key that is equal for locations of which one write would undo the other."""
        return self.module, self.side


def before_call(stack: ExitStack, module: nn.Module, function: Callable[[nn.Module, tuple, dict], Any]):
    """Call `function(module, args, kwargs)` before each call of `module`, until `stack` closes."""
    _register_before(stack, module, _Hook(Scope.of(stack), function))


def after_call(stack: ExitStack, module: nn.Module, function: Callable[[nn.Module, tuple, Any], Any]):
    """Call `function(module, args, output)` after each call of `module`, until `stack` closes."""
    _register_after(stack, module, _Hook(Scope.of(stack), function))


def read_at(stack: ExitStack, location: Location, function: Callable[[torch.Tensor], None]):
    """Call `function` with the value at `location`, `(batch, seq, width)`, in every forward pass until `stack` closes."""
    _attach(stack, location, function, writes=False)


def write_at(stack: ExitStack, location: Location, function: Callable[[torch.Tensor], torch.Tensor]):
    """Replace the value at `location` by `function(value)` in every forward pass until `stack` closes.

    Whoever reads there sees the new value, no matter which of the two was attached first; of several writers the one
    attached last has the last word.
    """
    _attach(stack, location, function, writes=True)


def wrap_forward(stack: ExitStack, module: nn.Module, forward: Callable):
    """Replace the forward method of `module` until `stack` closes; see [`wrap_method`]."""
    wrap_method(stack, module, "forward", forward)


def wrap_method(stack: ExitStack, module: nn.Module, name: str, method: Callable):
    """Replace `module.<name>` by `method` until `stack` closes; stacks may close in any order.

    Args:
        stack (`ExitStack`): Closes when the module's own method is to be back.
        module (`torch.nn.Module`): The module.
        name (`str`): Of the method.
        method (`Callable`):
            Called as `method(inner, *args, **kwargs)`, where `inner` is what answered before: the module's own method,
            or another wrapper of it.
    """
    wrapper = (Scope.of(stack), method)
    with attaching:
        wrapped = module.__dict__.get(name)
        if not isinstance(wrapped, _WrappedMethod):
            wrapped = _WrappedMethod(module, name)
            setattr(module, name, wrapped)
        wrapped.wrappers = (*wrapped.wrappers, wrapper)
    stack.callback(wrapped.remove, wrapper)


class _WrappedMethod:
    """A wrapped method: the wrappers that act on the current call, and the module's own method."""

    def __init__(self, module: nn.Module, name: str):
        self.module = module
        self.name = name
        # An instance attribute hides the class's; a module may already have one (accelerate's hooks set `forward`).
        self.earlier = module.__dict__.get(name)
        self.wrappers: tuple[tuple[Scope, Callable], ...] = ()
        self.__wrapped__: Callable
        # Signature, name and documentation are those of the method.
        functools.update_wrapper(self, getattr(module, name))

    def __call__(self, *args, **kwargs):
        return self._answer(self.wrappers, *args, **kwargs)

    def _answer(self, wrappers, /, *args, **kwargs):
        for number in range(len(wrappers) - 1, -1, -1):
            scope, method = wrappers[number]
            if scope.acts():
                return method(functools.partial(self._answer, wrappers[:number]), *args, **kwargs)
        return self.__wrapped__(*args, **kwargs)

    def remove(self, wrapper):
        with attaching:
            self.wrappers = tuple(other for other in self.wrappers if other is not wrapper)
            # Where something else has wrapped this meanwhile, it stays below it, and does nothing.
            if self.wrappers or self.module.__dict__.get(self.name) is not self:
                return
            if self.earlier is None:
                delattr(self.module, self.name)
            else:
                setattr(self.module, self.name, self.earlier)


class _Hook:
    """A hook of PyTorch that acts on the forward passes of a scope."""

    def __init__(self, scope: Scope, function: Callable):
        self.scope = scope
        self.function = function

    # One that another thread has just removed may still be called, without the keyword arguments it asked for.
    def __call__(self, module, args, more=None):
        return self.function(module, args, more) if self.scope.acts() else None


class _SiteHook(_Hook):
    """Shows the value at a location to a function, and puts the function's answer in its place if it `writes`."""

    def __init__(self, scope: Scope, location: Location, function: Callable, writes: bool):
        super().__init__(scope, function)
        self.location = location
        self.writes = writes
        # Shape of the current forward pass in each thread, where the module sees batch and positions as one axis.
        self.batch_shape = None if location.block is None else threading.local()

    def __call__(self, module, args, more=None):
        if self.scope.acts():
            return self.at_input(module, args, more) if self.location.side == "in" else self.at_output(more)
        if self.writes:
            self.scope.warn_if_left_out()
        return None

    def remember_batch_shape(self, block, args, kwargs):
        given = _first_input(block, args, kwargs)
        given = kwargs.get("inputs_embeds") if given is None else given
        self.batch_shape.value = None
        if isinstance(given, torch.Tensor):
            self.batch_shape.value = given.shape[:-1] if given.is_floating_point() else given.shape

    def at_input(self, module, args, kwargs):
        new = self.apply(_first_input(module, args, kwargs))
        if not self.writes:
            return None
        if args:
            return (new, *args[1:]), kwargs
        return args, {**kwargs, _first_parameter(module): new}

    def at_output(self, output):
        if not isinstance(output, tuple):
            return self.apply(output)
        new = self.apply(output[0])
        return (new, *output[1:]) if self.writes else None

    def apply(self, value):
        if not isinstance(value, torch.Tensor):
            raise TranscoderError(
                f"{type(self.location.module).__name__} has a {type(value).__name__} as its {self.location.side}put, "
                "not a tensor; choose a site inside or around it."
            )
        batch_shape = getattr(self.batch_shape, "value", None)
        flat = batch_shape is not None and value.shape[:-1].numel() == batch_shape.numel()
        flat = flat and value.dim() == 2 and value.is_floating_point()
        shaped = value.reshape(*batch_shape, value.shape[-1]) if flat else value
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
        # The new value may be an expanded tensor, or one that its writer keeps.
        return result.clone() if copied else result


def _attach(stack, location, function, writes):
    hook = _SiteHook(Scope.of(stack), location, function, writes)
    if location.side == "in":
        _register_before(stack, location.module, hook)
        hooks = location.module._forward_pre_hooks
    else:
        _register_after(stack, location.module, hook)
        hooks = location.module._forward_hooks
    if location.block is not None:
        before_call(stack, location.block, hook.remember_batch_shape)
    if writes:
        for identifier, other in list(hooks.items()):
            # Those of other threads may be removed meanwhile, and do not read here.
            if isinstance(other, _SiteHook) and not other.writes and other.scope.acts():
                hooks.move_to_end(identifier)


def _register_before(stack, module, hook):
    with attaching:
        stack.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)


def _register_after(stack, module, hook):
    with attaching:
        stack.callback(module.register_forward_hook(hook).remove)


def _first_input(module, args, kwargs):
    return args[0] if args else kwargs.get(_first_parameter(module))


def _first_parameter(module):
    return next(iter(inspect.signature(module.forward).parameters))
