"""The models that ``eval`` compares: each distinct one is exported, opened and run once."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from tome_export.artifact import MODEL, Artifact
from tome_export.merge.schedule import Schedule
from tome_export.progress import Progress, Silent
from tome_export.runtime.model import (
    ArtifactModel,
    exported_variant,
    model_from_artifact,
    open_runner,
    rescheduled,
)
from tome_export.runtime.registry import TORCH
from tome_export.runtime.runner import EngineFile

if TYPE_CHECKING:
    from tome_export.patch import MergedModel
    from tome_export.runtime.runner import Runner

MERGED, UNMERGED = "merged", "unmerged"


@dataclass(frozen=True)
class Candidate:
    """A model that is compared.

    Attributes:
        name: ``merged``, ``unmerged``, ``torch`` or ``r=4``.
        r: Tokens merged per layer, clamped.
        backend: What runs it.
        macs: Multiply-accumulates per image.
        subject: What to run; candidates of one schedule and backend share it.
    """

    name: str
    r: tuple[int, ...]
    backend: str
    macs: int
    subject: ArtifactModel

    @property
    def run(self) -> str:
        """Names what is computed: candidates that compute the same have the same."""
        return f"{self.backend} {self.subject.precision} r={','.join(map(str, self.r))}"


@contextlib.contextmanager
def candidates_of(
    artifact: Artifact,
    model: MergedModel,
    backend: str,
    against: Sequence[str],
    r: Sequence[int],
    progress: Progress,
) -> Iterator[list[Candidate]]:
    """Export whatever the artifact does not hold; it is there until the end of the block.

    Args:
        artifact: What is evaluated.
        model: The same in PyTorch.
        backend: What runs all but ``torch``.
        against: Of ``unmerged`` and ``torch``.
        r: Constant schedules to compare besides.
        progress: Told of each export.
    """
    wanted = [(MERGED, model)]
    if UNMERGED in against:
        wanted.append((UNMERGED, rescheduled(model, Schedule())))
    wanted += [(f"r={n}", rescheduled(model, Schedule(r=n))) for n in r]
    found: list[Candidate] = []
    subjects: dict[tuple[int, ...], ArtifactModel] = {}
    with contextlib.ExitStack() as stack:
        for name, module in wanted:
            layers = tuple(layer.r for layer in module.layers)
            if layers not in subjects:
                if name == MERGED:
                    subjects[layers] = model_from_artifact(artifact, name, module)
                else:
                    progress.stage(f"Export {name}")
                    context = exported_variant(artifact, name, module, progress)
                    subjects[layers] = stack.enter_context(context)
            subject = subjects[layers]
            found.append(Candidate(name, layers, backend, module.macs(), subject))
        if TORCH in against:
            # The yardstick is fp32, whatever the artifact's precision.
            subject = replace(subjects[found[0].r], label=TORCH, precision="fp32", module=model)
            at = 2 if UNMERGED in against else 1
            found.insert(at, Candidate(TORCH, found[0].r, TORCH, model.macs(), subject))
        yield found


@contextlib.contextmanager
def open_runs(candidates: Sequence[Candidate], progress: Progress) -> Iterator[dict[str, Runner]]:
    """A runner per distinct run, all open at once: each image is decoded once for all."""
    with contextlib.ExitStack() as stack:
        runners: dict[str, Runner] = {}
        for candidate in candidates:
            if candidate.run not in runners:
                context = open_runner(candidate.backend, candidate.subject, progress)
                runners[candidate.run] = stack.enter_context(context)
        yield runners


@dataclass(frozen=True)
class PackedCandidates:
    """Candidates with the content of their files, to be opened on a machine that has none.

    Attributes:
        candidates: Without folders that mean anything there.
        files: Per run: path in its folder -> content.
        threads: Of PyTorch here, so that sums are split there as here.
    """

    candidates: tuple[Candidate, ...]
    files: dict[str, dict[str, bytes]]
    threads: int

    @contextlib.contextmanager
    def open(self) -> Iterator[dict[str, Runner]]:
        """The runners, as ``open_runs``."""
        import torch

        torch.set_num_threads(self.threads)
        with tempfile.TemporaryDirectory(prefix="tome-export-") as name:
            arrived = []
            for number, candidate in enumerate(self.candidates):
                folder = Path(name) / str(number)
                for path, content in self.files[candidate.run].items():
                    (folder / path).parent.mkdir(parents=True, exist_ok=True)
                    (folder / path).write_bytes(content)
                engines = {
                    name: replace(engine, path=folder / engine.path.name)
                    for name, engine in candidate.subject.engines.items()
                }
                subject = replace(
                    candidate.subject, folder=folder, graph=folder / MODEL, engines=engines
                )
                arrived.append(replace(candidate, subject=subject))
            with open_runs(arrived, Silent()) as runners:
                yield runners


def packed(candidates: Sequence[Candidate]) -> PackedCandidates:
    """Read in what a machine needs that shares no files with this one."""
    import torch

    distinct = {candidate.run: candidate for candidate in reversed(candidates)}
    ready, files = [], {}
    for run, candidate in distinct.items():
        subject = candidate.subject
        engine = subject.engines.get(candidate.backend)
        torch_only = candidate.backend == TORCH
        paths = [] if torch_only else _files(subject.folder, engine)
        files[run] = {p.relative_to(subject.folder).as_posix(): p.read_bytes() for p in paths}
        engines = {candidate.backend: engine} if engine is not None else {}
        module = subject.module if torch_only else None
        ship = replace(subject, engines=engines, module=module)
        ready.append(replace(candidate, subject=ship))
    return PackedCandidates(tuple(ready), files, torch.get_num_threads())


def _files(folder: Path, engine: EngineFile | None) -> list[Path]:
    wanted = [*folder.glob("model.onnx*"), *folder.glob("plugins/**/*")]
    return [p for p in (*wanted, *([engine.path] if engine is not None else [])) if p.is_file()]
