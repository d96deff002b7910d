"""Ctrl-C and SIGTERM as exceptions, at once or after the current iteration."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


class Stopped(KeyboardInterrupt):
    """A signal asked the run to end."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.exit_code = 128 + number


def stop(number: int, _: Any) -> None:
    """Raise `Stopped` at once."""
    raise Stopped(number)


class Request:
    """Notes the first signal, for a training to `obey` where its state is complete. The second raises `Stopped`."""

    number = 0  # of the signal; 0 for none

    def note(self, number: int, _: Any) -> None:
        if self.number:
            raise Stopped(number)
        self.number = number
        # not print, which the signal may have interrupted
        os.write(2, b"\nstopping after this iteration; a second signal stops at once, at the last checkpoint\n")

    def obey(self) -> None:
        """Raise `Stopped` if a signal has arrived."""
        if self.number:
            raise Stopped(self.number)


@contextmanager
def signals(handle: Callable[[int, Any], None]) -> Iterator[None]:
    """Handle Ctrl-C and SIGTERM inside the block, in a main thread, which alone receives them. Ignored signals, as in
    a shell's background jobs, stay ignored."""
    before = {}
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(number) is not signal.SIG_IGN:
                before[number] = signal.signal(number, handle)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
