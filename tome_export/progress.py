"""How long work tells where it is."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Told of stages and what happens in them; implemented by the command line."""

    def stage(self, title: str) -> None:
        """A new stage begins; the one before it has ended."""

    def detail(self, text: str) -> None:
        """Something within the stage; may come from another thread."""

    def step(self, label: str, done: int, total: int) -> None:
        """So many of the stage's steps are done; may come from another thread.

        Args:
            label: What is counted; another label counts anew.
            done: Steps done; the first that is reported may have been done in an earlier run.
            total: Steps in all.
        """


class Silent:
    """Progress that nobody watches."""

    def stage(self, title: str) -> None:
        """Ignore."""

    def detail(self, text: str) -> None:
        """Ignore."""

    def step(self, label: str, done: int, total: int) -> None:
        """Ignore."""
