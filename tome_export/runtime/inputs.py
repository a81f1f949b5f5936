"""Inputs of a model besides its images, such as the query of the reducer ``query``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tome_export.runtime.runner import Arrays, Runner
from tome_export.spec import VIDEO_MASK

SEED = 0


def unit_inputs(shapes: Mapping[str, Sequence[int]], count: int) -> dict[str, np.ndarray[Any, Any]]:
    """Random vectors of unit length, always the same ones, where no others are at hand.

    Of a mask of frames: that all count.

    Args:
        shapes: Shape of each input by name, without the batch.
        count: Images.

    Returns:
        ``[count, ...]`` float32 by name.
    """
    rng = np.random.default_rng(SEED)
    found: dict[str, np.ndarray[Any, Any]] = {}
    for name, shape in shapes.items():
        if name == VIDEO_MASK:
            found[name] = np.ones((count, *shape), np.float32)
            continue
        drawn = rng.standard_normal((count, *shape)).astype(np.float32)
        found[name] = drawn / np.linalg.norm(drawn, axis=-1, keepdims=True)
    return found


class Fed:
    """A runner that gets ``unit_inputs`` besides what it is given, to be timed.

    Args:
        runner: What runs.
        shapes: Inputs that are missing, as for ``unit_inputs``.
    """

    def __init__(self, runner: Runner, shapes: Mapping[str, Sequence[int]]) -> None:
        self._runner, self._shapes = runner, shapes
        self._ready: dict[int, dict[str, np.ndarray[Any, Any]]] = {}

    def infer(self, inputs: Arrays) -> dict[str, np.ndarray[Any, Any]]:
        """Run one batch."""
        count = len(next(iter(inputs.values())))
        if count not in self._ready:
            self._ready[count] = unit_inputs(self._shapes, count)
        return self._runner.infer({**self._ready[count], **inputs})
