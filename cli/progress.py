"""Progress on standard error: a live display on a terminal, plain lines elsewhere."""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, TextIO

from tome_export.cli.quiet import quiet
from tome_export.cli.signals import raise_if_interrupted

if TYPE_CHECKING:
    from tome_export.cli.output import Terminal
    from tome_export.pipeline.progress import Progress

_STEPS = re.compile(r"(?P<text>.*): (?P<done>\d+)/(?P<total>\d+)")


ETA_INTERVAL_S = 30.0
"""Seconds between lines that say how far a long stage is, where there is no live display."""


class Eta:
    """How long the steps of a stage will still take, from those seen so far."""

    def __init__(self) -> None:
        self._title = ""
        self._first = (0, 0.0)

    def left_s(self, title: str, done: int, total: int) -> float | None:
        """Seconds left; None until two steps have been seen.

        Args:
            title: What is counted; another title begins anew.
            done: Steps done; the first that is seen may have been done earlier.
            total: Steps in all.
        """
        now = time.monotonic()
        if title != self._title or done < self._first[0]:
            self._title, self._first = title, (done, now)
        before, since = self._first
        return (now - since) / (done - before) * (total - done) if done > before else None


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
        self._stream = stream
        self._verbose = verbose
        self._eta = Eta()
        self._told = time.monotonic()

    def __enter__(self) -> Plain:
        return self

    def __exit__(self, *_: object) -> None:
        self._stream.flush()

    def stage(self, title: str) -> None:
        """See ``Progress``."""
        raise_if_interrupted()
        self._eta, self._told = Eta(), time.monotonic()
        self._stream.write(f"{title}\n")
        self._stream.flush()

    def detail(self, text: str) -> None:
        """See ``Progress``."""
        steps = _STEPS.fullmatch(text)
        left = None
        if steps is not None:
            left = self._eta.left_s(steps["text"], int(steps["done"]), int(steps["total"]))
        due = left is not None and time.monotonic() - self._told >= ETA_INTERVAL_S
        if self._verbose or due:
            more = f", about {duration(left)} left" if due and left is not None else ""
            self._stream.write(f"  {text}{more}\n")
            self._stream.flush()
        if due:
            self._told = time.monotonic()


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
        )

        self._console = Console(file=stream, highlight=False)
        self._verbose = verbose
        self._display = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=20),
            TimeElapsedColumn(),
            TextColumn("{task.fields[detail]}", style="dim", markup=False),
            console=self._console,
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
        )
        self._task: Any = None
        self._title = ""
        self._since = 0.0
        self._eta = Eta()

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
        self._title, self._since, self._eta = title, time.monotonic(), Eta()
        self._task = self._display.add_task(title, total=None, detail="")

    def detail(self, text: str) -> None:
        """See ``Progress``."""
        if self._verbose:
            self._console.print(f"  {text}", markup=False)
        if self._task is None:
            return
        steps = _STEPS.fullmatch(text)
        if steps is None:
            self._display.update(self._task, detail=text)
            return
        done, total = int(steps["done"]), int(steps["total"])
        left = self._eta.left_s(steps["text"], done, total)
        shown = steps["text"] if left is None else f"{steps['text']}, {duration(left)} left"
        self._display.update(self._task, detail=shown, completed=done, total=total)

    def _end(self, mark: str) -> None:
        if self._task is None:
            return
        self._display.remove_task(self._task)
        self._task = None
        seconds = time.monotonic() - self._since
        self._console.print(f"{mark} {self._title}  {seconds:.1f} s", markup=False)
