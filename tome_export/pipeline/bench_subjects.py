"""What ``bench`` measures: two models, on which backends, batch sizes and images."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from tome_export.artifact import Artifact, Manifest
from tome_export.engine import EngineOptions
from tome_export.engine.select import BACKENDS as ENGINES
from tome_export.errors import InputError
from tome_export.pipeline.backends import (
    ORT_CPU,
    TORCH,
    Subject,
    missing,
    subject_of,
    variant,
)
from tome_export.pipeline.engine import build_engine
from tome_export.pipeline.images import parity_images
from tome_export.pipeline.reference import model_name, reference_model, rescheduled
from tome_export.progress import Progress
from tome_export.spec import BatchRange

if TYPE_CHECKING:
    from tome_export.parity.decisions import Array

UNMERGED = "unmerged"
SAMPLES, NOISE = "samples", "noise"
COUNT = 24
"""Sample images, repeated up to the batch."""


def bench_images(manifest: Manifest, batch: int) -> tuple[Array, str]:
    """Images to time a model on: the recipe's samples, repeated; noise where they do not fit.

    Args:
        manifest: Of the artifact.
        batch: How many.

    Returns:
        ``pixel_values [batch, C, H, W]`` float32, frames in front of C for a model of videos, and
        ``samples`` or ``noise``.
    """
    from tome_export.models import resolve

    preprocessing = manifest.preprocessing
    shape = tuple(manifest.input.shape[1:])
    try:
        recipe = replace(resolve(model_name(manifest)), preprocessing=preprocessing)
        samples = parity_images(recipe, shape, None, COUNT)
    # A user's own model may not be importable here, or take what no photograph gives.
    except InputError:
        samples = None
    if samples is not None and samples.shape[1:] == shape:
        return samples[np.arange(batch) % len(samples)], SAMPLES
    channels = (preprocessing.input_size[0], 1, 1)
    mean, std = (
        np.resize(np.array(values, np.float32), channels)
        for values in (preprocessing.mean, preprocessing.std)
    )
    pixels = np.random.default_rng(0).random((batch, *shape), np.float32)
    return (pixels - mean) / std, NOISE


@contextlib.contextmanager
def open_subjects(
    artifact: Artifact,
    other: Artifact | None,
    weights: str | None,
    backends: tuple[str, ...],
    progress: Progress,
) -> Iterator[dict[str, Subject]]:
    """The artifact and what it is compared with."""
    from tome_export.bench.compare import AGAINST, MERGED
    from tome_export.merge.schedule import Schedule

    module = None
    if other is None or TORCH in backends:
        progress.stage(f"Load {artifact.manifest.model.name}")
        module, _ = reference_model(artifact, weights)
    merged = subject_of(artifact, MERGED, module)
    if other is not None:
        theirs = reference_model(other, weights)[0] if TORCH in backends else None
        yield {MERGED: merged, AGAINST: subject_of(other, str(other.path), theirs)}
    elif module is not None:
        progress.stage("Export the unmerged model")
        with variant(artifact, UNMERGED, rescheduled(module, Schedule()), progress) as unmerged:
            yield {MERGED: merged, AGAINST: unmerged}


def with_engine(name: str, subject: Subject, folder: Path, progress: Progress) -> Subject:
    """The subject with an engine for the backend, built if it has none and needs one."""
    engine = next((engine for engine in ENGINES if engine.name == name), None)
    if engine is None or name in subject.engines:
        return subject
    progress.stage(f"Build a {name} engine of {subject.label}")
    folder.mkdir()
    options = EngineOptions(batch=subject.batch)
    build_engine(engine, subject.folder, options, progress, folder, plugins=subject.plugins)
    return replace(subject, engines={**subject.engines, name: folder / engine.file_name})


def choose_backends(
    artifact: Artifact, asked: tuple[str, ...]
) -> tuple[tuple[str, ...], dict[str, str]]:
    """The backends to measure, and why engines of the artifact are left out."""
    if asked:
        return asked, {}
    reasons: dict[str, str | None] = {engine.name: missing(engine.name) for engine in ENGINES}
    built = [name for name in reasons if name in artifact.manifest.engines]
    skipped = {name: reason for name in built if (reason := reasons[name]) is not None}
    return (ORT_CPU, *(name for name in built if name not in skipped)), skipped


def choose_batches(
    asked: tuple[int, ...], artifact: Artifact, other: Artifact | None, backends: tuple[str, ...]
) -> tuple[int, ...]:
    """The batch sizes to measure.

    Raises:
        InputError: if one is outside what a model or an engine takes.
    """
    takes = artifact.manifest.batch
    chosen = tuple(dict.fromkeys(asked or (max(1, takes.min), takes.opt)))
    for one in (artifact, *([other] if other else [])):
        ranges = {"model": one.manifest.batch}
        engines = one.manifest.engines
        ranges |= {f"{b} engine": engines[b]["batch"] for b in backends if b in engines}
        for what, text in ranges.items():
            limits = BatchRange.parse(text)
            for batch in chosen:
                if not limits.min <= batch <= limits.max:
                    raise InputError(
                        f"batch is {batch}; the {what} of {one.path} takes {limits.min} to "
                        f"{limits.max}: choose --batch within that"
                    )
    return chosen


def check_comparable(artifact: Artifact, other: Artifact) -> None:
    """Require the same input and output of two artifacts.

    Raises:
        InputError: if they differ.
    """
    for what in ("input", "output"):
        mine, theirs = artifact.manifest[what], other.manifest[what]
        ours, found = ((m["name"], m["dtype"], m["shape"][1:]) for m in (mine, theirs))
        if ours != found:
            raise InputError(
                f"{other.path} has the {what} {found[0]} {found[2]}, {artifact.path} has "
                f"{ours[0]} {ours[2]}; only models with the same input and output are comparable"
            )
