"""End a run after its step when Ctrl-C or SIGTERM asks for it, so that a checkpoint can be saved."""

import contextlib
import signal
import threading
from collections.abc import Iterator


_NAMES = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM"}


class RunInterrupted(KeyboardInterrupt):
    """
    A run that Ctrl-C or SIGTERM has ended. Its text says at which step and how to go on.

    Args:
        text (`str`): One sentence.
        signal_number (`int`): Signal that ended the run.
    """

    def __init__(self, text: str, signal_number: int):
        super().__init__(text)
        #: Exit code of a process that ends with this signal: 130 for Ctrl-C, 143 for SIGTERM.
        self.exit_code = 128 + signal_number


class Interruption:
    """
    Notes the first SIGINT or SIGTERM while a step runs, and raises `KeyboardInterrupt` everywhere else. A second signal has
    its usual effect at once.
    """

    def __init__(self):
        #: The signal that has arrived, if any.
        self.signal: int | None = None
        #: Whether a step is being taken, so that the state of the run is not that after a whole step.
        self.in_step = False

    @property
    def name(self) -> str:
        """Name of the signal in messages."""
        return _NAMES[self.signal]  # pyright: ignore[reportArgumentType]

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Watches for signals inside the block. Only the main thread receives them; elsewhere nothing changes."""
        self.signal, self.in_step = None, False
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.getsignal(number) for number in _NAMES}

        def note(number, frame):
            self.signal = number
            for each, handler in before.items():
                signal.signal(each, handler)
            if not self.in_step:
                raise KeyboardInterrupt

        # Handlers of somebody else, and signals that are ignored (as under nohup), stay as they are.
        usual = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
        for number, handler in before.items():
            if handler is usual[number]:
                signal.signal(number, note)
        try:
            yield
        finally:
            for number, handler in before.items():
                if handler is usual[number]:
                    signal.signal(number, handler)

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """A part of a run that may be left at any point, such as reading data or an evaluation."""
        was = self.in_step
        self.in_step = False
        if self.signal is not None:
            raise KeyboardInterrupt
        yield
        # Not after an exception: then the run is left where it may be left.
        self.in_step = was

    def begin_step(self) -> None:
        """Marks the start of a step, which ends before the run does."""
        self.in_step = True

    def end_steps(self) -> None:
        """Marks the end of the last step."""
        self.in_step = False
