"""The processes that a server runs its python models in: found gone, as the server does not say."""

from __future__ import annotations

import os
import time
from pathlib import Path

from tome_export.serve.probe import DEAD, STOPPED, stub_states
from tome_export.serve.process import signal_name

DEAD_SECONDS = 0.5
"""A stub that the server ends itself is dead for a moment, until the server has collected it."""

STOPPED_SECONDS = 5.0
"""A stub that is stopped (SIGSTOP) answers nothing; for a moment somebody may look at it."""


class Stubs:
    """The stubs of one server.

    Args:
        server: Its process id.
        repository: What it serves.
        reloads: Whether models, and their stubs, may come and go while it runs.
    """

    def __init__(self, server: int, repository: Path, *, reloads: bool) -> None:
        self._server, self._reloads = server, reloads
        self._root = repository.absolute()
        self._models: dict[int, str] = {}
        self._since: dict[int, float] = {}

    def lost(self) -> str:
        """What has become of a stub that answers no more, for a message; empty if there is none."""
        now, states = time.monotonic(), stub_states(self._server)
        for pid, (state, status) in states.items():
            self._models.setdefault(pid, self._model_of(pid))
            if state not in DEAD + STOPPED:
                self._since.pop(pid, None)
                continue
            seconds = now - self._since.setdefault(pid, now)
            if state in DEAD and seconds >= DEAD_SECONDS:
                return f"the process of {self._models[pid]} {_end(status)}"
            if state in STOPPED and seconds >= STOPPED_SECONDS:
                return f"the process of {self._models[pid]} is stopped (SIGSTOP)"
        gone = self._models.keys() - states.keys()
        if gone and not self._reloads:  # later servers collect it when somebody asks for health
            return f"the process of {self._models[min(gone)]} has ended"
        for pid in gone:
            del self._models[pid]
        return ""

    def _model_of(self, pid: int) -> str:
        """Its model, from the path of the file that it runs."""
        try:
            words = Path(f"/proc/{pid}/cmdline").read_text(errors="replace").split("\0")
        except OSError:
            words = []
        paths = (Path(word) for word in words)
        inside = (p.relative_to(self._root) for p in paths if p.is_relative_to(self._root))
        named = (f"model {path.parts[0]}" for path in inside if path.parts)
        return next(named, "a python model")


def _end(status: int) -> str:
    if os.WIFSIGNALED(status):
        return f"was ended by {signal_name(os.WTERMSIG(status))}"
    return "has ended"
