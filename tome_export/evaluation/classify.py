"""Decoded images to a record: every run on the same padded batch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tome_export.errors import ExportError
from tome_export.evaluation.decode import Decoded
from tome_export.evaluation.records import TOP, Record
from tome_export.runtime.runner import Runner, infer_in_batches
from tome_export.spec import INPUT_NAME


@dataclass(frozen=True)
class Classifier:
    """How outputs become what is kept.

    Attributes:
        batch: Images per batch; shorter ones are padded, so that every image is always computed
            in the same surroundings and numbers repeat to the last digit.
        output_name: Name of the one output.
        classes: Whether it holds logits; else features, of which the cosine to those of
            ``baseline`` is kept.
        baseline: The run that is not merged.
    """

    batch: int
    output_name: str
    classes: bool
    baseline: str

    def record(self, decoded: Decoded, runners: Mapping[str, Runner]) -> Record:
        """Run every runner on a chunk.

        Raises:
            ExportError: if a runner fails.
        """
        count = len(decoded.pixels)
        values: dict[str, NDArray[Any]] = {}
        if count:
            outputs = {name: self._infer(name, r, decoded, count) for name, r in runners.items()}
            if self.classes:
                values = {name: best(output) for name, output in outputs.items()}
            else:
                plain = outputs[self.baseline]
                values = {name: cosine(output, plain) for name, output in outputs.items()}
        return Record(decoded.chunk, decoded.unreadable, values)

    def _infer(self, name: str, runner: Runner, decoded: Decoded, count: int) -> NDArray[Any]:
        inputs = {INPUT_NAME: decoded.pixels}
        try:
            return infer_in_batches(runner, inputs, count, self.batch)[self.output_name]
        # Runtimes raise what they please: out of memory, a kernel that is not there.
        except Exception as error:
            raise ExportError(
                f"{name} failed on a batch of {self.batch}: {error}; try a smaller --batch or "
                "another --backend"
            ) from error


def best(logits: NDArray[Any]) -> NDArray[np.int32]:
    """The best classes ``[B, TOP]`` of ``logits [B, C]``, of equal ones the lowest index first.

    Where there are fewer than ``TOP`` classes, or an output is not finite, the rest is -1.
    """
    order = np.argsort(-logits.astype(np.float64), axis=1, kind="stable")[:, :TOP]
    found = np.full((len(logits), TOP), -1, dtype=np.int32)
    found[:, : order.shape[1]] = order
    found[~np.isfinite(logits).all(axis=1)] = -1
    return found


def cosine(features: NDArray[Any], baseline: NDArray[Any]) -> NDArray[np.float64]:
    """Cosine ``[B, 1]`` of each image's features, whatever their shape, to the baseline's."""
    a, b = (x.reshape(len(x), -1).astype(np.float64) for x in (features, baseline))
    lengths = np.sqrt((a * a).sum(axis=1) * (b * b).sum(axis=1))
    dots = (a * b).sum(axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(lengths > 0, dots / lengths, np.nan)[:, None]
