"""What is kept of each chunk of images; every number of the result comes from these records."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tome_export.data.decode import Decoded
from tome_export.data.metrics import correlations
from tome_export.errors import ExportError, InputError
from tome_export.runtime.runner import Runner, infer_in_batches
from tome_export.spec import INPUT_NAME, Activation, OutputKind, answers

TOP = 5
"""Classes kept per image."""


UNDEFINED = 2.0
"""In place of a correlation with a map that is constant, which has none."""


@dataclass(frozen=True)
class Record:
    """The outcome of a chunk.

    Attributes:
        chunk: Number of the chunk.
        unreadable: Position in the chunk, name and reason of what could not be read.
        values: For each run of a model, of the images that could be read: the answer and the best
            classes, see ``ranked``; of a regression its numbers ``[B, K]`` float64; or of features
            the cosine, and of a map the correlation, to the unmerged output ``[B, 1]`` float64.
    """

    chunk: int
    unreadable: tuple[tuple[int, str, str], ...]
    values: Mapping[str, NDArray[Any]]

    def to_json(self) -> str:
        """One line; numbers come back to the last digit."""
        values = {run: array.tolist() for run, array in self.values.items()}
        return json.dumps([self.chunk, self.unreadable, values], separators=(",", ":"))

    @classmethod
    def from_json(cls, line: str) -> Record:
        """Inverse of ``to_json``; raises what it meets in a line that is no record."""
        chunk, unreadable, rows = json.loads(line)
        values = {run: np.asarray(array) for run, array in rows.items()}
        if not all(array.ndim == 2 and array.dtype.kind in "if" for array in values.values()):
            raise ValueError(f"record of chunk {chunk} holds what is no table of numbers")
        images = tuple((int(position), str(name), str(why)) for position, name, why in unreadable)
        return cls(int(chunk), images, values)


@dataclass(frozen=True)
class Classifier:
    """How outputs become what is kept.

    Attributes:
        batch: Images per batch; shorter ones are padded, so that every image is always computed
            in the same surroundings and numbers repeat to the last digit.
        activation: What makes scores of its logits; None for features and maps, of which the
            similarity to those of ``baseline`` is kept.
        baseline: The run that is not merged.
        kind: What the output is.
    """

    batch: int
    output_name: str
    activation: Activation | None
    baseline: str
    kind: OutputKind = "classes"

    def record(self, decoded: Decoded, runners: Mapping[str, Runner]) -> Record:
        """Run every runner on a chunk."""
        values: dict[str, NDArray[Any]] = {}
        if len(decoded.pixels):
            outputs = {
                name: self._infer(name, one, decoded.pixels) for name, one in runners.items()
            }
            if self.kind == "map":
                plain = outputs[self.baseline]
                constant = np.isnan(correlations(plain, plain))
            for name, output in outputs.items():
                if self.kind == "map":
                    values[name] = _of_maps(output, plain, constant)[:, None]
                elif self.activation is None:
                    values[name] = cosine(output, outputs[self.baseline])
                elif self.activation == "none":
                    values[name] = output.astype(np.float64)
                else:
                    values[name] = ranked(output, self.activation)
        return Record(decoded.chunk, decoded.unreadable, values)

    def _infer(self, name: str, runner: Runner, pixels: NDArray[np.float32]) -> NDArray[Any]:
        inputs = {INPUT_NAME: pixels}
        try:
            return infer_in_batches(runner, inputs, len(pixels), self.batch)[self.output_name]
        # Runtimes raise what they please: out of memory, a kernel that is not there.
        except Exception as error:
            raise ExportError(
                f"{name} failed on a batch of {self.batch}: {error}; try a smaller --batch or "
                "another --backend"
            ) from error


def as_classes(logits: NDArray[Any], activation: Activation) -> NDArray[Any]:
    """Logits ``[B, 2]`` of no and yes of one logit ``[B, 1]``, whose softmax is its sigmoid.

    Other logits ``[B, K]`` are returned as they are.
    """
    if activation != "sigmoid" or logits.shape[1] > 1:
        return logits
    return np.concatenate([np.zeros_like(logits), logits], axis=1)


def ranked(logits: NDArray[Any], activation: Activation) -> NDArray[Any]:
    """What is kept of the logits ``[B, K]`` of a classifier.

    Returns:
        The answer in the first column, the best classes in the last ``TOP``; all are -1 where an
        output is not finite. Of a softmax ``[B, TOP]`` int64, as the best class is the answer. Of a
        yes or no for each of several classes ``[B, 1 + TOP]`` int64, the answer being a number for
        the set of those with a yes. Of one logit ``[B, 2 + TOP]`` float64, the probability of a yes
        between the two.
    """
    classes = best(as_classes(logits, activation)).astype(np.int64)
    if activation == "softmax":
        return classes
    known = classes[:, :1] >= 0
    if logits.shape[1] == 1:
        yes = (1 + np.tanh(logits.astype(np.float64) / 2)) / 2
        return np.concatenate([classes[:, :1], np.where(known, yes, -1), classes], axis=1)
    packed = np.packbits(answers(logits, activation), axis=1)
    sets = [int.from_bytes(sha256(row.tobytes()).digest()[:7], "big") for row in packed]
    whole = np.where(known, np.array(sets, np.int64)[:, None], -1)
    return np.concatenate([whole, classes], axis=1)


def best(logits: NDArray[Any]) -> NDArray[np.int32]:
    """The best classes ``[B, TOP]`` of ``logits [B, C]``, of equal ones the lowest index first.

    Where there are fewer than ``TOP`` classes, or an output is not finite, the rest is -1.
    """
    order = np.argsort(-logits.astype(np.float64), axis=1, kind="stable")[:, :TOP]
    found = np.full((len(logits), TOP), -1, dtype=np.int32)
    found[:, : order.shape[1]] = order
    found[~np.isfinite(logits).all(axis=1)] = -1
    return found


def _of_maps(
    found: NDArray[Any], baseline: NDArray[Any], constant: NDArray[np.bool_]
) -> NDArray[np.float64]:
    """Correlation ``[B]`` of each image's map with the baseline's, ``constant [B]`` or not.

    It is 0 for a constant map where the baseline's is none, ``UNDEFINED`` where that is constant,
    and NaN for a map that is not finite.
    """
    similar = np.nan_to_num(correlations(found, baseline), nan=0.0)
    similar[constant] = UNDEFINED
    finite = np.isfinite(found).reshape(len(found), -1).all(axis=1)
    return np.where(finite, similar, np.nan)


def cosine(features: NDArray[Any], baseline: NDArray[Any]) -> NDArray[np.float64]:
    """Cosine ``[B, 1]`` of each image's features, whatever their shape, to the baseline's."""
    a, b = (x.reshape(len(x), -1).astype(np.float64) for x in (features, baseline))
    lengths = np.sqrt((a * a).sum(axis=1) * (b * b).sum(axis=1))
    dots = (a * b).sum(axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(lengths > 0, dots / lengths, np.nan)[:, None]


class RecordTable:
    """The records of so many images, in chunks of a batch."""

    def __init__(self, images: int, batch: int) -> None:
        self.images, self.batch = images, batch
        self.images_done = 0
        self._records: list[Record | None] = [None] * -(-images // batch)

    def add(self, record: Record) -> None:
        """Take a record in, instead of what is there of its chunk."""
        if self._records[record.chunk] is None:
            self.images_done += min(self.batch, self.images - record.chunk * self.batch)
        self._records[record.chunk] = record

    def takes(self, record: Record, runs: Collection[str]) -> bool:
        """Whether a record is one of a chunk whose images could all be read, of these runs."""
        if not 0 <= record.chunk < len(self._records):
            return False
        rows = min(self.batch, self.images - record.chunk * self.batch)
        whole = all(len(array) == rows for array in record.values.values())
        return not record.unreadable and set(record.values) == set(runs) and whole

    def missing(self) -> list[int]:
        """Chunks that are still to be done."""
        return [chunk for chunk, record in enumerate(self._records) if record is None]

    @property
    def readable(self) -> NDArray[np.bool_]:
        """Which images could be read ``[B]``; all of those that are still to be done."""
        mask = np.ones(self.images, dtype=bool)
        for record in filter(None, self._records):
            mask[[record.chunk * self.batch + place for place, _, _ in record.unreadable]] = False
        return mask

    def values(self, run: str) -> NDArray[Any]:
        """What a run gave for the readable images, in order; see ``Record``."""
        return np.concatenate([one.values[run] for one in self._records if one and one.values])

    def unreadable(self) -> list[tuple[str, str]]:
        """Name and reason, in the order of the images."""
        done = filter(None, self._records)
        return [(name, reason) for record in done for _, name, reason in record.unreadable]

    def require_images(self) -> None:
        """Raise ``InputError`` if no image could be read."""
        if not self.readable.any():
            name, reason = self.unreadable()[0]
            raise InputError(
                f"none of the {self.images} images could be read; the first is {name}: {reason}"
            )
