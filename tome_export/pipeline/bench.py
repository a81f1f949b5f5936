"""``tome-export bench``: how fast an artifact is, beside the unmerged model or another artifact."""

from __future__ import annotations

import contextlib
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tome_export.artifact import MODEL, Artifact
from tome_export.errors import InputError, UsageError
from tome_export.pipeline.backends import ORT_CPU, Subject, open_runner, require
from tome_export.pipeline.bench_subjects import (
    UNMERGED,
    bench_images,
    check_comparable,
    choose_backends,
    choose_batches,
    open_subjects,
    with_engine,
)
from tome_export.pipeline.inputs import asked_inputs
from tome_export.progress import Progress, Silent
from tome_export.spec import BatchRange

if TYPE_CHECKING:
    from tome_export.parity.decisions import Array

BENCH = "bench.json"
PROFILE_RUNS = 10
EMULATED = "ort-cpu emulates bfloat16 in float32: its times say nothing of bfloat16 hardware"
NO_PROFILE = "{} is not profiled: time per part of the model is measured with ort-cpu only"
"""On a GPU, ONNX Runtime's profiler sees kernels being launched, not running."""

SLOWED = 1.15
"""Times the median latency above which a profile's total is remarked on."""


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
    bench: dict[str, Any]
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
    from tome_export.bench.environment import environment

    progress = progress or Silent()
    require(request.backends)
    progress.stage("Verify the artifact")
    artifact = Artifact.open(request.artifact.absolute())
    backends, skipped = choose_backends(artifact, request.backends)
    other = None
    if request.against != UNMERGED:
        other = Artifact.open(Path(request.against).absolute())
        check_comparable(artifact, other)
    batches = choose_batches(request.batches, artifact, other, backends)
    notes = [f"Skipped {name}: {reason}" for name, reason in skipped.items()]
    if other is None and not any(artifact.manifest.merge.r):
        notes.append(
            "This artifact does not merge: it is compared with itself, so the speed-up is noise"
        )
    if ORT_CPU in backends and artifact.manifest.precision == "bf16":
        notes.append(EMULATED)
    if request.profile:
        notes += [NO_PROFILE.format(name) for name in backends if name != ORT_CPU]
    if extra := asked_inputs(artifact.manifest):
        notes.append(f"Given for {', '.join(extra)}: random vectors of unit length")
    theirs = (other or artifact).manifest.macs
    ratio = theirs["unmerged" if other is None else "merged"] / artifact.manifest.macs.merged
    images, kind = bench_images(artifact.manifest, max(*batches, 1))
    with open_subjects(artifact, other, request.weights, backends, progress) as subjects:
        bencher = _Bench(request, subjects, images, ratio, progress)
        for name in backends:
            takes = artifact.manifest.engines.get(name, artifact.manifest)["batch"]
            bencher.measure(name, batches, BatchRange.parse(takes).min == 1)
    found = {
        "latency_ms": bencher.latency_ms,
        "environment": environment(),
        "against": UNMERGED if other is None else str(other.path),
        "macs_ratio": ratio,
        "rounds": request.rounds,
        "warmup": request.warmup,
        "images": kind,
        "notes": [*notes, *bencher.notes],
        "rows": bencher.rows,
        "profile": bencher.profiles,
    }
    try:
        artifact = artifact.record(BENCH, found)
    # The figures stand also where they cannot be written down, as on a read-only mount.
    except InputError as error:
        return BenchResult(artifact, found, str(error))
    return BenchResult(artifact, found)


class _Bench:
    """Measures backend after backend and collects what was found."""

    def __init__(
        self,
        request: BenchRequest,
        subjects: dict[str, Subject],
        images: Array,
        macs_ratio: float,
        progress: Progress,
    ) -> None:
        self._request = request
        self._subjects = subjects
        self._images = images
        self._ratio = macs_ratio
        self._progress = progress
        self.latency_ms: dict[str, float] = {}
        self.rows: list[dict[str, Any]] = []
        self.profiles: list[dict[str, Any]] = []
        self.notes: list[str] = []

    def measure(self, name: str, batches: tuple[int, ...], takes_one: bool) -> None:
        """Time both models on one backend; then their memory, and their profile."""
        with contextlib.ExitStack() as stack:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="tome-export-")))
            ready = {
                label: with_engine(name, subject, folder / label, self._progress)
                for label, subject in self._subjects.items()
            }
            rows = self._timed(name, ready, batches, takes_one)
            for row in rows:
                self._add_memory(name, ready, row, folder)
            self.rows += rows
        if self._request.profile and name == ORT_CPU:
            for row in rows:
                self._profile(row)

    def _timed(
        self, name: str, ready: dict[str, Subject], batches: tuple[int, ...], takes_one: bool
    ) -> list[dict[str, Any]]:
        import numpy as np

        from tome_export.bench.compare import MERGED, compare, times
        from tome_export.runtime.inputs import Fed

        rounds, warmup, rows = self._request.rounds, self._request.warmup, []
        with contextlib.ExitStack() as stack:
            self._progress.stage(f"Load the models on {name}")
            runners = {
                label: Fed(
                    stack.enter_context(open_runner(name, subject, self._progress)), subject.further
                )
                for label, subject in ready.items()
            }
            for batch in batches:
                self._progress.stage(f"Time {rounds} rounds on {name}, batch {batch}")

                def told(done: int) -> None:
                    self._progress.step("round", done, rounds)

                images = self._images[:batch]
                row = compare(runners, images, self._ratio, rounds, warmup, told)
                rows.append({"backend": name, **row.to_dict()})
            one = next((r[MERGED]["latency_ms"]["p50"] for r in rows if r["batch"] == 1), None)
            if one is None and takes_one:
                # Whoever routes requests between artifacts compares single images.
                self._progress.stage(f"Time {rounds} rounds on {name}, batch 1")
                alone = {MERGED: runners[MERGED]}
                seconds = times(alone, self._images[:1], rounds, warmup)[MERGED]
                one = 1e3 * float(np.median(seconds))
            if one is not None:
                self.latency_ms[name] = one
        return rows

    def _add_memory(
        self, name: str, ready: dict[str, Subject], row: dict[str, Any], folder: Path
    ) -> None:
        from tome_export.pipeline.bench_memory import peak_memory

        batch, shape = row["batch"], list(self._images.shape[1:])
        self._progress.stage(f"Measure memory on {name}, batch {batch}")
        for label, subject in ready.items():
            memory = peak_memory(name, subject, batch, shape, folder)
            row[label]["peak_memory_bytes"] = memory.peak_bytes
            note = f"Peak memory on {name} is not known: {memory.reason}"
            if memory.reason is not None and note not in self.notes:
                self.notes.append(note)

    def _profile(self, row: dict[str, Any]) -> None:
        from tome_export.bench.profile import profile_in_turn

        name, batch = row["backend"], row["batch"]
        self._progress.stage(f"Profile {name}, batch {batch}")
        paths = {label: subject.folder / MODEL for label, subject in self._subjects.items()}
        profiles = profile_in_turn(paths, self._images[:batch], PROFILE_RUNS)
        for label, profile in profiles.items():
            timed = row[label]["latency_ms"]["p50"]
            if profile.total_ms > SLOWED * timed:
                self.notes.append(
                    f"Profiled on {name} at batch {batch}, the nodes of {label} take "
                    f"{profile.total_ms:.2f} ms, a run without the profiler {timed:.2f} ms: read "
                    "its parts as shares, or measure again on a quiet machine"
                )
        found = {label: profile.to_dict() for label, profile in profiles.items()}
        merged = found["merged"]
        self.profiles.append(
            {
                "backend": name,
                "batch": batch,
                "total_ms": merged["total_ms"],
                "attributed_share": merged["attributed_share"],
                **found,
            }
        )
