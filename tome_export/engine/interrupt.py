"""Run a long call into C++ so that Ctrl-C can end it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")
_POLL_SECONDS = 0.05


def run_interruptibly(call: Callable[[], T], cancel: threading.Event) -> T:
    """Run ``call`` in a thread of its own and wait for it.

    Python handles signals in the main thread, between two of its instructions. A builder running
    there either delays Ctrl-C to its end or, when a callback happens to run, swallows it: the
    bindings print «Exception caught in step_complete()», and the program goes on as if nothing
    had happened. In a second thread callbacks never see a signal: the main thread does, sets
    ``cancel``, and waits until the call has stopped, so that no builder outlives the interpreter.
    A second Ctrl-C does not wait.

    Args:
        call: The work; it must end soon after ``cancel`` is set.
        cancel: A flag that it looks at, clear at the start.
    """
    results: list[T] = []
    failures: list[BaseException] = []
    began, done = threading.Event(), threading.Event()

    def work() -> None:
        began.set()
        try:
            # An interrupt may come while the thread is being started: then there is no work.
            if not cancel.is_set():
                results.append(call())
        except BaseException as error:
            failures.append(error)
        finally:
            done.set()

    try:
        threading.Thread(target=work, name="engine-build", daemon=True).start()
        while not done.wait(_POLL_SECONDS):
            pass
    except BaseException:
        cancel.set()
        while began.is_set() and not done.wait(_POLL_SECONDS):
            pass
        raise
    if failures:
        raise failures[0]
    return results[0]
