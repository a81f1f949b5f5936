"""Progress on standard error: a live display on a terminal, plain lines elsewhere."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, TextIO

from tome_export.cli.output import aside, quiet
from tome_export.cli.signals import raise_if_interrupted

if TYPE_CHECKING:
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
        live = stream.isatty() and os.environ.get("TERM") != "dumb"
        with Display(stream, verbose=terminal.verbose, live=live) as progress:
            yield progress


class Display:
    """A ``Progress`` for people.

    Live it is a spinner, the stage, its steps and its time; ended stages stay as lines. Else it is
    one line per stage and every while in a long one. With ``verbose`` it is all that happens.
    """

    def __init__(self, stream: TextIO, *, verbose: bool, live: bool) -> None:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            Progress,
            SpinnerColumn,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        self._stream, self._verbose, self._live = stream, verbose, live
        self._console = Console(file=stream, highlight=False)
        # Where it draws nothing, it knows how long the rest will take nevertheless.
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
            disable=not live,
            get_time=lambda: time.monotonic(),
            speed_estimate_period=float("inf"),
        )
        self._title, self._label = "", ""
        self._since = self._told = time.monotonic()

    def __enter__(self) -> Display:
        if self._live:
            self._display.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._end("✓" if kind is None else "✗")
        self._display.stop()

    def stage(self, title: str) -> None:
        """See ``Progress``."""
        raise_if_interrupted()
        self._end("✓")
        self._display.add_task(title, total=None, detail="")
        self._title, self._label = title, ""
        self._since = self._told = time.monotonic()
        if not self._live:
            self._write(title)

    def detail(self, text: str) -> None:
        """See ``Progress``."""
        if self._verbose:
            self._write(f"  {text}")
        for task in self._display.task_ids:
            self._display.update(task, detail=text)

    def step(self, label: str, done: int, total: int) -> None:
        """See ``Progress``."""
        shown = f"{label}: {done}/{total}"
        for task in self._display.tasks:
            if label != self._label:
                self._display.reset(task.id)
                task.start_time = self._since  # the time shown is the stage's
            self._display.update(task.id, completed=done, total=total, detail=shown)
        self._label = label
        left = self._time_left()
        self._told = self._told if left is None else time.monotonic()
        if self._verbose or left is not None:
            more = "" if left is None else f", about {duration(left)} left"
            self._write(f"  {shown}{more}")

    def _time_left(self) -> float | None:
        """Seconds, where a line is due that says so."""
        if self._live or time.monotonic() - self._told < ETA_INTERVAL_S:
            return None
        return self._display.tasks[0].time_remaining if self._display.tasks else None

    def _end(self, mark: str) -> None:
        for task in self._display.task_ids:
            self._display.remove_task(task)
            if self._live:
                self._write(f"{mark} {self._title}  {time.monotonic() - self._since:.1f} s")

    def _write(self, line: str) -> None:
        if self._live:
            self._console.print(line, markup=False)
        else:
            aside(self._stream, f"{line}\n")
