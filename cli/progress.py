"""Progress on standard error: a live display on a terminal, plain lines elsewhere."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, TextIO

from tome_export.cli.output import aside
from tome_export.cli.quiet import quiet
from tome_export.cli.signals import raise_if_interrupted

if TYPE_CHECKING:
    from rich.progress import TaskID

    from tome_export.cli.output import Terminal
    from tome_export.progress import Progress

ETA_INTERVAL_S = 30.0
"""Seconds between lines that say how far a long stage is, where there is no live display."""


def duration(seconds: float) -> str:
    """Seconds for people, as exact as a guess deserves."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"


@contextlib.contextmanager
def working(terminal: Terminal) -> Iterator[Progress]:
    """Run a library call inside: its progress is shown, the noise of others is not."""
    with quiet(debug=terminal.debug) as stream:
        shown = Live if _is_live(stream) else Plain
        with shown(stream, terminal.verbose) as progress:
            yield progress


def _is_live(stream: TextIO) -> bool:
    return stream.isatty() and os.environ.get("TERM") != "dumb"


class Plain:
    """One line per stage and every while in a long one; with ``verbose`` all that happens."""

    def __init__(self, stream: TextIO, verbose: bool) -> None:
        from rich.progress import Progress

        self._stream = stream
        self._verbose = verbose
        # Draws nothing, and knows how long the rest will take.
        self._steps = Progress(
            disable=True, get_time=lambda: time.monotonic(), speed_estimate_period=float("inf")
        )
        self._label: str | None = None
        self._task = self._steps.add_task("")
        self._told = time.monotonic()

    def __enter__(self) -> Plain:
        return self

    def __exit__(self, *_: object) -> None:
        """Every line has been written by now."""

    def stage(self, title: str) -> None:
        """See ``Progress``."""
        raise_if_interrupted()
        self._label, self._told = None, time.monotonic()
        self._write(title)

    def detail(self, text: str) -> None:
        """See ``Progress``."""
        if self._verbose:
            self._write(f"  {text}")

    def step(self, label: str, done: int, total: int) -> None:
        """See ``Progress``."""
        if label != self._label:
            self._label = label
            self._steps.reset(self._task)
        self._steps.update(self._task, completed=done, total=total)
        left = self._steps.tasks[0].time_remaining
        due = left is not None and time.monotonic() - self._told >= ETA_INTERVAL_S
        if due:
            self._told = time.monotonic()
        if self._verbose or due:
            more = f", about {duration(left)} left" if due and left is not None else ""
            self._write(f"  {label}: {done}/{total}{more}")

    def _write(self, line: str) -> None:
        aside(self._stream, f"{line}\n")


class Live:
    """A spinner, the stage, its steps and its time; ended stages stay as lines."""

    def __init__(self, stream: TextIO, verbose: bool) -> None:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            Progress,
            SpinnerColumn,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        self._console = Console(file=stream, highlight=False)
        self._verbose = verbose
        self._display = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=20),
            TimeElapsedColumn(),
            TextColumn("{task.fields[detail]}", style="dim", markup=False),
            TimeRemainingColumn(compact=True),
            console=self._console,
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
            speed_estimate_period=float("inf"),
        )
        self._task: TaskID | None = None
        self._title = ""
        self._label: str | None = None
        self._since = 0.0

    def __enter__(self) -> Live:
        self._display.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._end("✓" if kind is None else "✗")
        self._display.stop()

    def stage(self, title: str) -> None:
        """See ``Progress``."""
        raise_if_interrupted()
        self._end("✓")
        self._title, self._since, self._label = title, time.monotonic(), None
        self._task = self._display.add_task(title, total=None, detail="")

    def detail(self, text: str) -> None:
        """See ``Progress``."""
        if self._verbose:
            self._console.print(f"  {text}", markup=False)
        if self._task is not None:
            self._display.update(self._task, detail=text)

    def step(self, label: str, done: int, total: int) -> None:
        """See ``Progress``."""
        shown = f"{label}: {done}/{total}"
        if self._verbose:
            self._console.print(f"  {shown}", markup=False)
        if self._task is None:
            return
        if label != self._label:
            self._label = label
            self._display.reset(self._task, detail=shown)
            self._display.tasks[0].start_time = self._since  # the time shown is the stage's
        self._display.update(self._task, completed=done, total=total, detail=shown)

    def _end(self, mark: str) -> None:
        if self._task is None:
            return
        self._display.remove_task(self._task)
        self._task = None
        seconds = time.monotonic() - self._since
        self._console.print(f"{mark} {self._title}  {seconds:.1f} s", markup=False)
