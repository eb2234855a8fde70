"""Limit changes of a model to the forward passes of one thread, and of threads that it starts."""

import functools
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, Generic, TypeVar

import torch

from ..errors import TranscoderError
from ..text import logging


logger = logging.get_logger(__name__)

T = TypeVar("T")

# Held while something is attached or removed: PyTorch numbers its hooks without one. A block may also be closed by the
# garbage collector, in a thread that is opening another.
attaching = threading.RLock()


class Shared:
    """A context that several blocks share: the first block enters it, and the last one leaves it, in any order.

    Args:
        make (`Callable`): Gives the context manager.
    """

    def __init__(self, make: Callable[[], AbstractContextManager]):
        self._make = make
        self._count = 0
        self._context = ExitStack()

    def hold(self, stack: ExitStack):
        """Hold the context until `stack` closes."""
        with attaching:
            if self._count == 0:
                self._context.enter_context(self._make())
            self._count += 1
        stack.callback(self._release)

    def _release(self):
        with attaching:
            self._count -= 1
            if self._count == 0:
                self._context.close()


@contextmanager
def patched(owner: type, name: str, value: Any):
    """Replace an attribute of a class inside the `with` block."""
    earlier = owner.__dict__[name]
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, earlier)


class Scope:
    """The forward passes that a hook or wrapper acts on until a stack closes.

    They are those of this thread, and of threads that are started, and tasks that are submitted to a pool of threads, while
    it is attached, from here or from such a thread.

    Args:
        stack (`ExitStack`): Closes when it is detached.
    """

    __slots__ = ("_owner",)

    def __init__(self, stack: ExitStack):
        self._owner = _here.scopes
        if self._owner is None:
            raise TranscoderError(
                "A model cannot be read or changed from a thread that Python did not start: enter the block in one that "
                "`threading` started."
            )
        _around.hold(stack)
        _open.add(self)
        self._owner.add(self)
        stack.callback(self._close)

    @classmethod
    def of(cls, stack: ExitStack) -> "Scope":
        """The scope of everything that this thread attaches to `stack`."""
        scope = _of_stacks.get(stack)
        # A stack may have been closed, or handed to another thread, since.
        if scope is None or scope not in scope._owner or scope._owner is not _here.scopes:
            scope = _of_stacks[stack] = cls(stack)
        return scope

    def acts(self) -> bool:
        """Whether the current forward pass is one of them."""
        scopes = _here.scopes
        if scopes is None:
            return self._acts_on_foreign_thread()
        return self in scopes

    def warn_if_left_out(self):
        """Warn once if a change is left out in a thread that itself changes no model."""
        if not _here.scopes and self in self._owner:
            logger.warning_once(
                "A model was called in a thread while another thread changes it, and the change was left out: a `with` "
                "block acts on the thread that entered it and on threads and tasks that are started inside it."
            )

    def _acts_on_foreign_thread(self):
        if len({id(scope._owner) for scope in list(_open)}) > 1:
            raise TranscoderError(
                "Several threads read or change models, and autograd computes a forward pass again (gradient "
                "checkpointing) in a separate thread, which belongs to none of them: do it in one thread at a time, or "
                "call `model.gradient_checkpointing_disable()`."
            )
        return self in self._owner

    def _close(self):
        # The owner's own set, whichever thread closes the block; threads started inside still have it in theirs.
        self._owner.discard(self)
        _open.discard(self)


class OfThread(Generic[T]):
    """A value per thread; a thread without its own gets the one that was set last."""

    def __init__(self, value: T):
        self._last = value
        self._own = threading.local()

    def set(self, value: T):
        self._own.value = self._last = value

    def get(self) -> T:
        return getattr(self._own, "value", self._last)

    @property
    def is_set(self) -> bool:
        """Whether this thread has set one."""
        return hasattr(self._own, "value")


class _Here(threading.local):
    """Scopes that act in a thread; `None` in a thread that Python did not start, such as autograd's."""

    def __init__(self):
        thread = threading.current_thread()
        self.scopes: set[Scope] | None = _inherited.pop(thread, None)
        if self.scopes is None and not isinstance(thread, threading._DummyThread):
            self.scopes = set()


_open: set[Scope] = set()
_of_stacks: "weakref.WeakKeyDictionary[ExitStack, Scope]" = weakref.WeakKeyDictionary()
_inherited: "weakref.WeakKeyDictionary[threading.Thread, set[Scope]]" = weakref.WeakKeyDictionary()
_here = _Here()


@contextmanager
def _handing_on():
    """Let new threads, and tasks that are submitted to a pool, inherit the scopes of the thread that starts them."""
    start, submit = threading.Thread.start, ThreadPoolExecutor.submit

    def start_here(thread):
        if _here.scopes:
            _inherited[thread] = set(_here.scopes)
        start(thread)

    def submit_here(pool, function, /, *args, **kwargs):
        if _here.scopes:
            function = functools.partial(_run_in, set(_here.scopes), function)
        return submit(pool, function, *args, **kwargs)

    with patched(threading.Thread, "start", start_here), patched(ThreadPoolExecutor, "submit", submit_here):
        yield


def _run_in(scopes, function, *args, **kwargs):
    earlier, _here.scopes = _here.scopes, scopes
    try:
        return function(*args, **kwargs)
    finally:
        _here.scopes = earlier


@contextmanager
def _without_compiled_code():
    """Run compiled models uncompiled: code from `torch.compile` skips hooks that are added later."""
    with torch.compiler.set_stance("force_eager"):
        yield


@contextmanager
def _around_all():
    with _handing_on(), _without_compiled_code():
        yield


_around = Shared(_around_all)
