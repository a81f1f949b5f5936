"""The one way in which everything that runs is called, and running in batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

Arrays = Mapping[str, np.ndarray[Any, Any]]


class Runner(Protocol):
    """Runs a model on a batch."""

    def infer(self, inputs: Arrays) -> dict[str, np.ndarray[Any, Any]]:
        """Outputs by name for inputs by name, batch first."""


def infer_in_batches(
    runner: Runner, inputs: Arrays, count: int, size: int
) -> dict[str, np.ndarray[Any, Any]]:
    """Run any number of images in batches of exactly ``size``, the last one padded.

    Args:
        runner: What runs.
        inputs: Arrays whose first dimension is ``count``.
        count: Number of images.
        size: Images per batch.
    """
    parts: list[dict[str, np.ndarray[Any, Any]]] = []
    for start in range(0, count, size):
        index = np.minimum(np.arange(start, start + size), count - 1)
        part = runner.infer({k: v[index] for k, v in inputs.items()})
        parts.append({k: v[: min(size, count - start)] for k, v in part.items()})
    names: Sequence[str] = list(parts[0])
    return {name: np.concatenate([part[name] for part in parts]) for name in names}
