"""``tome-export bench``: how fast an artifact is, beside the unmerged model or another artifact."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tome_export.artifact import MODEL, Artifact, Manifest
from tome_export.artifact.bench import BENCH, Bench, BenchProfile, BenchRow, Quantiles, Timed
from tome_export.bench.memory import peak_memory
from tome_export.data.images import parity_images
from tome_export.errors import InputError, UsageError
from tome_export.merge.schedule import Schedule
from tome_export.progress import Progress, Silent
from tome_export.runtime.environment import environment
from tome_export.runtime.inputs import Fed, asked_inputs
from tome_export.runtime.model import (
    ArtifactModel,
    exported_variant,
    model_from_artifact,
    open_runner,
    reference_model,
    rescheduled,
    with_engine,
)
from tome_export.runtime.registry import ORT_CPU, backend_of, require, usual_backends
from tome_export.runtime.timing import Seconds, paired, percentiles
from tome_export.spec import INPUT_NAME

MERGED, AGAINST = "merged", "against"
"""Names of the artifact and of what it is compared with."""

UNMERGED = "unmerged"
SAMPLES, NOISE = "samples", "noise"
COUNT = 24
"""Sample images, repeated up to the batch."""

PROFILE_RUNS = 10
NO_PROFILE = "{} is not profiled: time per part of the model is measured with ort-cpu only"
"""On a GPU, ONNX Runtime's profiler sees kernels being launched, not running."""

SLOWED = 1.15
"""Times the median latency above which a profile's total is remarked on."""

_HALF = {"fp16": "float16", "bf16": "bfloat16"}


@dataclass(frozen=True)
class BenchRequest:
    """What to measure.

    Attributes:
        artifact: The artifact directory.
        batches: Batch sizes; empty for 1 and the one the artifact is tuned for.
        against: ``unmerged``, or the directory of another artifact.
        backends: By name; empty for ONNX Runtime plus every engine of the artifact that can run.
        rounds: Timed runs of each model.
        warmup: Untimed runs of each model, first.
        weights: Where the weights are now, if not where they were at the build.
        profile: Whether to take ONNX Runtime's profile too.

    Raises:
        UsageError: if rounds or warm-up runs are too few.
    """

    artifact: Path
    batches: tuple[int, ...] = ()
    against: str = UNMERGED
    backends: tuple[str, ...] = ()
    rounds: int = 20
    warmup: int = 3
    weights: str | None = None
    profile: bool = True

    def __post_init__(self) -> None:
        for name, value, least in (("rounds", self.rounds, 1), ("warmup", self.warmup, 0)):
            if value < least:
                raise UsageError(f"--{name} is {value}; expected {least} or more")


@dataclass(frozen=True)
class BenchResult:
    """What was measured.

    Attributes:
        artifact: The artifact, with ``bench.json`` in it.
        bench: The content of ``bench.json``.
        unrecorded: Why the result is not in the artifact, as when that is read-only; else None.
    """

    artifact: Artifact
    bench: Bench
    unrecorded: str | None = None


def bench(request: BenchRequest, progress: Progress | None = None) -> BenchResult:
    """Time an artifact beside another model, profile both, and record it in the artifact.

    Raises:
        UsageError: if a backend does not exist.
        InputError: if an artifact is damaged, its weights cannot be found, the two are not
            comparable, or a batch size is outside what they take.
        MissingComponentError: if a backend asked for cannot run here.
        ExportError: if a backend refuses a model.
    """
    progress = progress or Silent()
    require(request.backends)
    progress.stage("Verify the artifact")
    artifact = Artifact.open(request.artifact.absolute())
    backends, skipped = request.backends, dict[str, str]()
    if not backends:
        backends, skipped = usual_backends(artifact.manifest.engines)
    other = None
    if request.against != UNMERGED:
        other = Artifact.open(Path(request.against).absolute())
        _check_comparable(artifact, other)
    batches = _batches(request.batches, artifact, other, backends)
    ours, theirs = artifact.manifest.macs, (other or artifact).manifest.macs
    ratio = (theirs.unmerged if other is None else theirs.merged) / ours.merged
    images, kind = bench_images(artifact.manifest, max(*batches, 1))
    with _compared(artifact, other, request.weights, backends, progress) as models:
        measured = _Measurements(request, models, images, ratio, progress)
        for name in backends:
            measured.add(name, batches, artifact.manifest.batch_on(name).min == 1)
    found = Bench(
        latency_ms=measured.latency_ms,
        environment=environment(),
        against=UNMERGED if other is None else str(other.path),
        macs_ratio=ratio,
        rounds=request.rounds,
        warmup=request.warmup,
        images=kind,
        notes=(*_notes(request, artifact.manifest, backends, skipped), *measured.notes),
        rows=tuple(measured.rows),
        profile=tuple(measured.profiles),
    )
    try:
        return BenchResult(artifact.record(BENCH, found), found)
    # The figures stand also where they cannot be written down, as on a read-only mount.
    except InputError as error:
        return BenchResult(artifact, found, str(error))


def _check_comparable(artifact: Artifact, other: Artifact) -> None:
    mine, theirs = artifact.manifest, other.manifest
    for what, a, b in (
        ("input", mine.input, theirs.input),
        ("output", mine.output, theirs.output),
    ):
        if (a.name, a.dtype, a.shape[1:]) != (b.name, b.dtype, b.shape[1:]):
            raise InputError(
                f"{other.path} has the {what} {b.name} {b.dtype} {list(b.shape[1:])}, "
                f"{artifact.path} has {a.name} {a.dtype} {list(a.shape[1:])}; only models with the "
                "same input and output are comparable"
            )


def _batches(
    asked: tuple[int, ...], artifact: Artifact, other: Artifact | None, backends: tuple[str, ...]
) -> tuple[int, ...]:
    """The batch sizes to measure, each within what models and engines take."""
    takes = artifact.manifest.batch
    chosen = tuple(dict.fromkeys(asked or (max(1, takes.min), takes.opt)))
    for one in (artifact, *([other] if other else [])):
        limits = {"model": one.manifest.batch}
        built = (backend for backend in backends if backend in one.manifest.engines)
        limits |= {f"{backend} engine": one.manifest.batch_on(backend) for backend in built}
        for what, limit in limits.items():
            for batch in chosen:
                if not limit.min <= batch <= limit.max:
                    raise InputError(
                        f"batch is {batch}; the {what} of {one.path} takes {limit.min} to "
                        f"{limit.max}: choose --batch within that"
                    )
    return chosen


def bench_images(manifest: Manifest, batch: int) -> tuple[NDArray[Any], str]:
    """The recipe's samples, repeated, or noise where they do not fit; and which of the two.

    They are ``[batch, ...]``, of the dtype and shape of the model's input.
    """
    from tome_export.models import resolve

    preprocessing = manifest.preprocessing
    shape = tuple(int(size) for size in manifest.input.shape[1:])
    # A user's own model may not be importable here, or take what no photograph gives.
    with contextlib.suppress(InputError):
        recipe = replace(resolve(manifest.model.resolvable_name()), preprocessing=preprocessing)
        size = (*shape[:-3], *preprocessing.input_size)
        samples = parity_images(recipe, size, None, COUNT)
        if samples.shape[1:] == shape:
            return samples[np.arange(batch) % len(samples)], SAMPLES
    random = np.random.default_rng(0)
    if preprocessing.pixel_dtype == "uint8":
        return random.integers(0, 256, (batch, *shape), np.uint8), NOISE
    channels = (preprocessing.input_size[0], 1, 1)
    mean, std = (
        np.resize(np.array(values, np.float32), channels)
        for values in (preprocessing.mean, preprocessing.std)
    )
    return (random.random((batch, *shape), np.float32) - mean) / std, NOISE


@contextlib.contextmanager
def _compared(
    artifact: Artifact,
    other: Artifact | None,
    weights: str | None,
    backends: tuple[str, ...],
    progress: Progress,
) -> Iterator[dict[str, ArtifactModel]]:
    opened = {backend_of(name).opens for name in backends}
    module = None
    if other is None or "module" in opened:
        progress.stage(f"Load {artifact.manifest.model.name}")
        module, _ = reference_model(artifact, weights)
    merged = model_from_artifact(artifact, MERGED, module)
    if other is not None:
        theirs = reference_model(other, weights)[0] if "module" in opened else None
        yield {MERGED: merged, AGAINST: model_from_artifact(other, str(other.path), theirs)}
    elif module is not None:
        unmerged = rescheduled(module, Schedule())
        if opened == {"module"}:
            yield {MERGED: merged, AGAINST: replace(merged, label=UNMERGED, module=unmerged)}
            return
        progress.stage("Export the unmerged model")
        with exported_variant(artifact, UNMERGED, unmerged, progress) as exported:
            yield {MERGED: merged, AGAINST: exported}


def _notes(
    request: BenchRequest, manifest: Manifest, backends: tuple[str, ...], skipped: dict[str, str]
) -> list[str]:
    notes = [f"Skipped {name}: {reason}" for name, reason in skipped.items()]
    if request.against == UNMERGED and not any(manifest.merge.r):
        notes.append(
            "This artifact does not merge: it is compared with itself, so the speed-up is noise"
        )
    for name in backends:
        if backend_of(name).computes(manifest.precision) != manifest.precision:
            half = _HALF[manifest.precision]
            notes.append(
                f"{name} computes {half} in float32: its times say nothing of {half} hardware"
            )
    if request.profile:
        notes += [NO_PROFILE.format(name) for name in backends if name != ORT_CPU]
    if extra := asked_inputs(manifest):
        notes.append(f"Given for {', '.join(extra)}: random vectors of unit length")
    return notes


class _Measurements:
    """What is measured of both models, backend after backend."""

    def __init__(
        self,
        request: BenchRequest,
        models: Mapping[str, ArtifactModel],
        images: NDArray[Any],
        macs_ratio: float,
        progress: Progress,
    ) -> None:
        self._request, self._models, self._images = request, models, images
        self._macs_ratio, self._progress = macs_ratio, progress
        self.latency_ms: dict[str, float] = {}
        self.rows: list[BenchRow] = []
        self.profiles: list[BenchProfile] = []
        self.notes: list[str] = []

    def add(self, name: str, batches: Sequence[int], takes_one: bool) -> None:
        """Time both models on one backend; then their memory, and their profile."""
        with tempfile.TemporaryDirectory(prefix="tome-export-") as folder:
            ready = {}
            for label, model in self._models.items():
                own = Path(folder) / label
                own.mkdir()
                ready[label] = with_engine(name, model, own, self._progress)
            seconds = self._times(name, ready, batches, takes_one)
            rows = [
                row_from_seconds(name, batch, seconds[batch], self._macs_ratio) for batch in batches
            ]
            if 1 in seconds:
                self.latency_ms[name] = 1e3 * float(np.median(seconds[1][MERGED]))
            self.rows += [self._with_memory(row, ready) for row in rows]
        if self._request.profile and name == ORT_CPU:
            self.profiles += map(self._profile, rows)

    def _times(
        self, name: str, ready: Mapping[str, ArtifactModel], batches: Sequence[int], takes_one: bool
    ) -> dict[int, dict[str, Seconds]]:
        """Seconds of each model by batch size, of which one image is of the artifact alone."""
        rounds, warmup = self._request.rounds, self._request.warmup
        with contextlib.ExitStack() as stack:
            self._progress.stage(f"Load the models on {name}")
            runners = {
                label: Fed(
                    stack.enter_context(open_runner(name, model, self._progress)),
                    model.extra_inputs,
                )
                for label, model in ready.items()
            }
            # Whoever routes requests between artifacts compares single images.
            alone = [(1, {MERGED: runners[MERGED]})] if takes_one and 1 not in batches else []
            found = {}
            for batch, timed in [*((batch, runners) for batch in batches), *alone]:
                self._progress.stage(f"Time {rounds} rounds on {name}, batch {batch}")
                inputs = {INPUT_NAME: self._images[:batch]}
                found[batch] = paired(
                    {label: partial(one.infer, inputs) for label, one in timed.items()},
                    rounds,
                    warmup,
                    on_round=lambda done: self._progress.step("round", done, rounds),
                )
            return found

    def _with_memory(self, row: BenchRow, ready: Mapping[str, ArtifactModel]) -> BenchRow:
        self._progress.stage(f"Measure memory on {row.backend}, batch {row.batch}")
        shape, measured = (row.batch, *self._images.shape[1:]), {}
        for label, timed in ((MERGED, row.merged), (AGAINST, row.against)):
            further, dtype = ready[label].extra_inputs, self._images.dtype.name
            memory = peak_memory(row.backend, ready[label], further, shape, dtype)
            measured[label] = timed.model_copy(update={"peak_memory_bytes": memory.peak_bytes})
            note = f"Peak memory on {row.backend} is not known: {memory.reason}"
            if memory.reason is not None and note not in self.notes:
                self.notes.append(note)
        return row.model_copy(update=measured)

    def _profile(self, row: BenchRow) -> BenchProfile:
        from tome_export.runtime.profile import profile_in_turn

        self._progress.stage(f"Profile {row.backend}, batch {row.batch}")
        paths = {label: model.folder / MODEL for label, model in self._models.items()}
        profiles = profile_in_turn(paths, self._images[: row.batch], PROFILE_RUNS)
        found = {label: profile.entry() for label, profile in profiles.items()}
        for label, timed in ((MERGED, row.merged), (AGAINST, row.against)):
            if found[label].total_ms > SLOWED * timed.latency_ms.p50:
                self.notes.append(
                    f"Profiled on {row.backend} at batch {row.batch}, the nodes of {label} take "
                    f"{found[label].total_ms:.2f} ms, a run without the profiler "
                    f"{timed.latency_ms.p50:.2f} ms: read its parts as shares, or measure again "
                    "on a quiet machine"
                )
        return BenchProfile(
            backend=row.backend,
            batch=row.batch,
            total_ms=found[MERGED].total_ms,
            attributed_share=found[MERGED].attributed_share,
            **found,
        )


def row_from_seconds(
    backend: str, batch: int, seconds: Mapping[str, Seconds], macs_ratio: float
) -> BenchRow:
    """A line of ``bench.json``, without the memory.

    ``seconds`` are of each run ``[rounds]``, by ``merged`` and ``against``; entry i of both is of
    the same round. ``macs_ratio`` is the speed-up if merging cost nothing and time went with MACs.
    """
    speedup = Quantiles(**percentiles(seconds[AGAINST] / seconds[MERGED]))
    timed = {}
    for name in (MERGED, AGAINST):
        latency = Quantiles(**percentiles(1e3 * seconds[name]))
        timed[name] = Timed(latency_ms=latency, throughput=1e3 * batch / latency.p50)
    return BenchRow(
        backend=backend,
        batch=batch,
        **timed,
        speedup=speedup,
        share_of_macs_limit=speedup.p50 / macs_ratio,
    )
