"""Ctrl-C, SIGTERM and a closed terminal end a command cleanly: what was begun is removed."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType

GRACE_S = 3.0
"""Seconds in which further signals are ignored, so that a second Ctrl-C cannot stop the tidying."""

LINES = {"SIGINT": "interrupted", "SIGTERM": "terminated", "SIGHUP": "terminal closed"}


class Interrupted(BaseException):
    """The command is to end; no ``KeyboardInterrupt``, which libraries and click handle themselves.

    Attributes:
        exit_code: 128 plus the signal's number, as shells have it: 130 for Ctrl-C.
    """

    def __init__(self, number: int) -> None:
        super().__init__(LINES[signal.Signals(number).name])
        self.exit_code = 128 + number


class _Handler:
    def __init__(self) -> None:
        self.first: Interrupted | None = None
        self.since = 0.0

    def __call__(self, number: int, _frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.first is not None and now - self.since < GRACE_S:
            return
        self.first, self.since = self.first or Interrupted(number), now
        raise self.first


_handler = _Handler()


def interrupt() -> Interrupted | None:
    """What ended the command, or is to, also where a library made another error of it."""
    return _handler.first


def raise_if_interrupted() -> None:
    """Raise again an interrupt that ``except:`` in a library, or a callback from C++, dropped."""
    if _handler.first is not None and threading.current_thread() is threading.main_thread():
        raise _handler.first


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Turn the signals that ask a program to end into ``Interrupted``."""
    if threading.current_thread() is not threading.main_thread():
        yield  # Python lets only the main thread have handlers
        return
    numbers = [n for n in map(_number, LINES) if n is not None]
    # A signal that was ignored from the start (nohup, a shell's background job) stays ignored.
    taken = [n for n in numbers if signal.getsignal(n) is not signal.SIG_IGN]
    before = {number: signal.signal(number, _handler) for number in taken}
    _handler.first = None
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _number(name: str) -> signal.Signals | None:
    return getattr(signal, name, None)
