"""Every member of a cascade on every image, once; what is kept is small."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tome_export.artifact import Artifact
from tome_export.cascade import policy
from tome_export.cascade.calibrate import Observations
from tome_export.data.decode import Task, decoded_chunks
from tome_export.data.source import Source, selection
from tome_export.errors import ExportError, InputError
from tome_export.progress import Progress
from tome_export.runtime.model import model_from_artifact, open_runner
from tome_export.runtime.runner import Runner, infer_in_batches
from tome_export.spec import INPUT_NAME

LIMIT = 2048
"""Most images taken where the user sets no limit."""

MOST_SURPRISE = 50.0
"""Nats that one image counts at most: one that is wrong beyond doubt must not decide alone."""


@dataclass(frozen=True)
class ObservationSpec:
    """How the members are run and what is looked at.

    Attributes:
        members: Artifacts of one model.
        backend: What runs them.
        measure: Of the confidence.
        patch: Height and width of a patch, where average patches are needed; else None.
    """

    members: tuple[Artifact, ...]
    backend: str
    measure: str
    patch: tuple[int, int] | None


@dataclass(frozen=True)
class ObservedImages:
    """What was seen of some images.

    Attributes:
        observations: Of those that could be read, in the order of the listing.
        labelled: Whether truth is the labels; else it is what the last member says.
        unreadable: Name and reason of the others.
        notes: What a user should know of the listing.
    """

    observations: Observations
    labelled: bool
    unreadable: tuple[tuple[str, str], ...]
    notes: tuple[str, ...]


def observed(
    source: Source, limit: int | None, spec: ObservationSpec, progress: Progress
) -> ObservedImages:
    """Run all members on the images of a source.

    Args:
        source: The images.
        limit: Most images, taken evenly from the listing; None for ``LIMIT``.
        spec: Members and what to keep.
        progress: Told of the images done.

    Raises:
        InputError: if no image can be read, or the members share no batch size.
        ExportError: if a member fails.
    """
    from tome_export.data.preprocess import pixels_from_bytes

    chosen = selection(len(source), limit or LIMIT)
    preprocessing = spec.members[0].manifest.preprocessing
    decode = partial(pixels_from_bytes, preprocessing=preprocessing)
    batch = _batch(spec.members)
    starts = range(0, len(chosen), batch)
    tasks = [
        Task(n, tuple(source.items(chosen[start : start + batch])))
        for n, start in enumerate(starts)
    ]
    labels = None if source.labels is None else np.asarray(source.labels)[chosen].astype(np.int64)
    parts: list[Observations] = []
    readable = np.ones(len(chosen), np.bool_)
    unreadable: list[tuple[str, str]] = []
    with contextlib.ExitStack() as stack:
        runners = [
            stack.enter_context(
                open_runner(spec.backend, model_from_artifact(one, str(one.path)), progress)
            )
            for one in spec.members
        ]
        for decoded in decoded_chunks(tasks, decode, 0):
            for position, name, reason in decoded.unreadable:
                readable[decoded.chunk * batch + position] = False
                unreadable.append((name, reason))
            if len(decoded.pixels):
                rows = slice(decoded.chunk * batch, (decoded.chunk + 1) * batch)
                known = None if labels is None else labels[rows][readable[rows]]
                parts.append(_seen(decoded.pixels, known, runners, spec, batch))
            done = min(len(chosen), (decoded.chunk + 1) * batch)
            progress.step("images", done, len(chosen))
    if not parts:
        name, reason = unreadable[0]
        raise InputError(
            f"none of the {len(chosen)} images of {source.text} could be read; the first is "
            f"{name}: {reason}"
        )
    return ObservedImages(
        _joined(parts), labels is not None, tuple(unreadable), tuple(source.notes)
    )


def _seen(
    pixels: NDArray[np.float32],
    labels: NDArray[np.int64] | None,
    runners: Sequence[Runner],
    spec: ObservationSpec,
    batch: int,
) -> Observations:
    logits = [policy.two_classes(_logits(one, pixels, spec, batch)) for one in runners]
    classes = np.stack([_best_class(one) for one in logits])
    truth = classes[-1] if labels is None else labels
    return Observations(
        classes,
        np.stack([policy.confidence(one, spec.measure) for one in logits]),
        np.stack([_surprise(one, truth) for one in logits]),
        policy.complexity(pixels),
        policy.mean_patch(pixels, spec.patch) if spec.patch else np.empty((len(pixels), 0)),
        truth,
    )


def _best_class(logits: NDArray[Any]) -> NDArray[np.int64]:
    """``[B]``: of equal ones the lowest; -1 where an output is not finite."""
    finite = np.isfinite(logits).all(axis=1)
    return np.where(finite, logits.argmax(axis=1), -1).astype(np.int64)


def _surprise(logits: NDArray[Any], truth: NDArray[np.int64]) -> NDArray[np.float64]:
    """Cross-entropy ``[B]`` in nats, ``MOST_SURPRISE`` at most and where there is no number."""
    known = np.isfinite(logits).all(axis=1) & (truth >= 0)
    safe = np.where(known[:, None], logits, 0.0)
    found = -policy.log_softmax(safe)[np.arange(len(truth)), np.maximum(truth, 0)]
    return np.asarray(np.where(known, np.minimum(found, MOST_SURPRISE), MOST_SURPRISE))


def _logits(runner: Runner, pixels: NDArray[np.float32], spec: ObservationSpec, batch: int) -> Any:
    try:
        return infer_in_batches(runner, {INPUT_NAME: pixels}, len(pixels), batch)["logits"]
    # Runtimes raise what they please: out of memory, a kernel that is not there.
    except Exception as error:
        raise ExportError(
            f"{spec.backend} failed on a batch of {batch}: {error}; try another --backend"
        ) from error


def _joined(parts: Sequence[Observations]) -> Observations:
    return Observations(
        np.concatenate([part.classes for part in parts], axis=1),
        np.concatenate([part.confidence for part in parts], axis=1),
        np.concatenate([part.surprise for part in parts], axis=1),
        np.concatenate([part.complexity for part in parts]),
        np.concatenate([part.patches for part in parts]),
        np.concatenate([part.truth for part in parts]),
    )


def _batch(members: Sequence[Artifact]) -> int:
    """A batch size that all members take, near to what they are tuned for."""
    ranges = [one.manifest.batch for one in members]
    least, most = max(r.min for r in ranges), min(r.max for r in ranges)
    if least > most:
        texts = ", ".join(str(one.manifest.batch) for one in members)
        raise InputError(
            f"the artifacts take batches of {texts}, which have no size in common; rebuild them "
            "with one --batch"
        )
    return min(max(min(r.opt for r in ranges), least), most)
