"""What is kept of each chunk of images; every number of the result comes from these records."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tome_export.errors import InputError
from tome_export.evaluation.source import Item

TOP = 5
"""Classes kept per image."""


@dataclass(frozen=True)
class Task:
    """A chunk: the unit of work for processes, machines and resuming.

    Attributes:
        chunk: Its number.
        items: Its images.
    """

    chunk: int
    items: tuple[Item, ...]


@dataclass(frozen=True)
class Record:
    """The outcome of a chunk.

    Attributes:
        chunk: Its number.
        unreadable: Position in the chunk, name and reason of what could not be read.
        values: Per run, for the images that could: the best classes ``[B, TOP]`` int32, best
            first, -1 where the output is not finite; or of models without classes the cosine to
            the unmerged output ``[B, 1]`` float64.
    """

    chunk: int
    unreadable: tuple[tuple[int, str, str], ...]
    values: Mapping[str, NDArray[Any]]

    def to_bytes(self) -> bytes:
        """One line, without its end."""
        values = {
            run: [array.dtype.str, list(array.shape), base64.b64encode(array.tobytes()).decode()]
            for run, array in self.values.items()
        }
        content = {"chunk": self.chunk, "unreadable": self.unreadable, "values": values}
        return json.dumps(content, separators=(",", ":")).encode()

    @classmethod
    def from_bytes(cls, line: bytes) -> Record:
        """Inverse of ``to_bytes``.

        Raises:
            ValueError: if it is none.
        """
        content = json.loads(line)
        values = {
            run: np.frombuffer(base64.b64decode(data), dtype=np.dtype(kind)).reshape(shape)
            for run, (kind, shape, data) in content["values"].items()
        }
        unreadable = tuple((int(p), str(n), str(r)) for p, n, r in content["unreadable"])
        return cls(int(content["chunk"]), unreadable, values)


class Table:
    """Records put together.

    Args:
        images: Images in all.
        batch: Images per chunk.
        runs: Names of the runs.
        classes: Whether the model has classes; else values are cosines.
    """

    def __init__(self, images: int, batch: int, runs: Sequence[str], *, classes: bool) -> None:
        self.images, self.batch = images, batch
        self.chunks = -(-images // batch)
        self.done = np.zeros(self.chunks, dtype=bool)
        self.readable = np.zeros(images, dtype=bool)
        self._unreadable: dict[int, tuple[str, str]] = {}
        shape, kind = ((images, TOP), np.int32) if classes else ((images, 1), np.float64)
        self._values = {run: np.full(shape, -1, dtype=kind) for run in runs}

    def add(self, record: Record) -> None:
        """Take a record in; one that is there already changes nothing."""
        start = record.chunk * self.batch
        count = min(self.batch, self.images - start)
        bad = {position for position, _, _ in record.unreadable}
        good = [start + position for position in range(count) if position not in bad]
        for run, values in self._values.items():
            if good:
                found = record.values[run]
                values[good, : found.shape[1]] = found
        self.readable[good] = True
        for position, name, reason in record.unreadable:
            self._unreadable[start + position] = (name, reason)
        self.done[record.chunk] = True

    @property
    def images_done(self) -> int:
        """Images whose chunk is done."""
        whole = int(np.count_nonzero(self.done)) * self.batch
        short = self.chunks * self.batch - self.images
        return whole - (short if self.done[-1] else 0)

    def values(self, run: str) -> NDArray[Any]:
        """Of the readable images, in order; see ``Record``."""
        found: NDArray[Any] = self._values[run][self.readable]
        return found

    def unreadable(self) -> list[tuple[str, str]]:
        """Name and reason, in the order of the images."""
        return [self._unreadable[index] for index in sorted(self._unreadable)]

    def require_images(self) -> None:
        """Check that there is something to tell of.

        Raises:
            InputError: if no image could be read.
        """
        if not self.readable.any():
            name, reason = self.unreadable()[0]
            raise InputError(
                f"none of the {self.images} images could be read; the first is {name}: {reason}"
            )
