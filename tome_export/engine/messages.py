"""TensorRT's messages and progress, received in Python.

TensorRT keeps one logger per process: a second one is ignored with a warning while objects made
with the first are alive. So there is one logger per module, and ``collect`` says where its
messages go. Callbacks must never raise: they are called from C++ functions that are ``noexcept``.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

from tome_export.progress import Progress

# Said of every node of a function body that is inlined a second time; nothing queries those nodes.
_INLINED_AGAIN = "already exists, the output tensors of this new instance will not be queryable"

_loggers: dict[str, Any] = {}
_lock = threading.RLock()


@dataclass
class Messages:
    """What TensorRT said, in order.

    Attributes:
        parsing: The node the parser was last seen at, ``name [operator]``, from its verbose log.
    """

    errors: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    parsing: str = ""

    def add(self, severity: str, text: str) -> None:
        """Keep an error or a warning; of the rest only where the parser is."""
        if severity == "VERBOSE":
            node, found, _ = text.partition(" inputs: ")
            self.parsing = node if found and node.endswith("]") else self.parsing
            return
        if _INLINED_AGAIN in text:
            return
        kept = {"ERROR": self.errors, "INTERNAL_ERROR": self.errors, "WARNING": self.warnings}
        target = kept.get(severity)
        line = " ".join(text.split())
        if target is not None and line not in target:
            target.append(line)

    def first_errors(self, count: int = 2) -> str:
        """The first errors in one line."""
        return "; ".join(self.errors[:count]) or "no reason was given"


def _logger(trt: ModuleType) -> Any:
    if trt.__name__ not in _loggers:

        class Logger(trt.ILogger):  # type: ignore[misc, name-defined]
            """Hands messages to the ``Messages`` of the call in progress."""

            def __init__(self) -> None:
                trt.ILogger.__init__(self)
                self.messages: Messages | None = None

            def log(self, severity: Any, text: str) -> None:
                if self.messages is not None:
                    self.messages.add(severity.name, text)

        _loggers[trt.__name__] = Logger()
    return _loggers[trt.__name__]


@contextmanager
def collect(trt: ModuleType) -> Iterator[tuple[Any, Messages]]:
    """The logger to hand to TensorRT, and what it receives meanwhile.

    Calls from several threads take turns: the logger cannot tell whose message it gets.
    """
    with _lock:
        logger, messages = _logger(trt), Messages()
        before, logger.messages = logger.messages, messages
        try:
            yield logger, messages
        finally:
            logger.messages = before


def monitor_for(trt: ModuleType, progress: Progress | None, cancel: threading.Event) -> Any:
    """A progress monitor that reports the builder's outer phases and stops the build on ``cancel``.

    An exception of ``progress`` cancels the build and is kept as the monitor's ``failure``.
    """

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc, name-defined]
        """Outer phases only: inner ones come by the hundred."""

        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.failure: BaseException | None = None
            self._steps: dict[str, int] = {}

        def _report(self, phase_name: str, done: int = 0) -> None:
            if progress is None or self.failure is not None:
                return
            try:
                if done:
                    progress.step(phase_name, done, self._steps[phase_name])
                else:
                    progress.detail(phase_name)
            except BaseException as error:  # handed to the caller once the builder has returned
                self.failure = error
                cancel.set()

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            if parent_phase is None or parent_phase in self._steps:
                if parent_phase is None:
                    self._steps[phase_name] = num_steps
                self._report(phase_name)

        def phase_finish(self, phase_name: str) -> None:
            self._steps.pop(phase_name, None)

        def step_complete(self, phase_name: str, step: int) -> bool:
            if phase_name in self._steps:
                self._report(phase_name, step + 1)
            return not cancel.is_set()

    return Monitor()
