"""The models that are compared: each distinct one is exported, opened and run once."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
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
from tome_export.runtime.registry import TORCH, backend_of

if TYPE_CHECKING:
    from tome_export.patch import MergedModel
    from tome_export.runtime.runner import Runner

MERGED, UNMERGED = "merged", "unmerged"

Opener = Callable[[], AbstractContextManager[dict[str, "Runner"]]]
"""Opens a runner per run where it is called; can be pickled, and needs no file of this machine."""


@dataclass(frozen=True)
class Candidate:
    """A model that is compared.

    Attributes:
        name: ``merged``, ``unmerged``, ``torch`` or ``r=4``.
        r: Tokens merged per layer, clamped.
        model: What to run; candidates of one schedule and backend share it.
    """

    name: str
    r: tuple[int, ...]
    backend: str
    macs: int
    model: ArtifactModel

    @property
    def run(self) -> str:
        """Names what is computed: candidates that compute the same have the same."""
        return f"{self.backend} {self.model.precision} r={','.join(map(str, self.r))}"


@contextlib.contextmanager
def candidates_of(
    artifact: Artifact,
    model: MergedModel,
    backend: str,
    against: Sequence[str],
    r: Sequence[int],
    progress: Progress,
) -> Iterator[list[Candidate]]:
    """Export whatever the artifact does not hold; it is there until the end of the block."""
    own = model_from_artifact(artifact, MERGED, model)
    merged = Candidate(MERGED, tuple(layer.r for layer in model.layers), backend, model.macs(), own)
    found, by_r = [merged], {merged.r: own}
    # All before the first export, which takes long: a schedule may be refused.
    wanted = [(UNMERGED, rescheduled(model, Schedule()))] if UNMERGED in against else []
    wanted += [(f"r={n}", rescheduled(model, Schedule(r=n))) for n in r]
    with contextlib.ExitStack() as stack:
        for name, module in wanted:
            layers = tuple(layer.r for layer in module.layers)
            if layers not in by_r and backend_of(backend).opens == "module":
                by_r[layers] = replace(own, label=name, module=module)
            elif layers not in by_r:
                progress.stage(f"Export {name}")
                exported = exported_variant(artifact, name, module, progress)
                by_r[layers] = stack.enter_context(exported)
            found.append(Candidate(name, layers, backend, module.macs(), by_r[layers]))
        if TORCH in against:
            # The yardstick is fp32, whatever the artifact's precision.
            yardstick = replace(own, label=TORCH, precision="fp32")
            at = 2 if UNMERGED in against else 1
            found.insert(at, replace(merged, name=TORCH, backend=TORCH, model=yardstick))
        yield found


def distinct(candidates: Iterable[Candidate]) -> dict[str, Candidate]:
    """One candidate for each run."""
    found: dict[str, Candidate] = {}
    for candidate in candidates:
        found.setdefault(candidate.run, candidate)
    return found


@contextlib.contextmanager
def open_runners(
    candidates: Mapping[str, Candidate], progress: Progress
) -> Iterator[dict[str, Runner]]:
    """A runner per run, all open at once: each image is decoded once for all."""
    with contextlib.ExitStack() as stack:
        yield {
            run: stack.enter_context(open_runner(one.backend, one.model, progress))
            for run, one in candidates.items()
        }


def portable(candidates: Mapping[str, Candidate]) -> Opener:
    """What opens the runners on a machine that shares no files with this one."""
    import torch

    packed = {}
    for run, candidate in candidates.items():
        model, name = candidate.model, candidate.backend
        paths: list[Path] = []
        if backend_of(name).opens == "module":
            model = replace(model, engines={})
        else:
            engines = {name: model.engines[name]} if name in model.engines else {}
            model = replace(model, engines=engines, module=None)
            paths = [*model.folder.glob("model.onnx*"), *model.folder.glob("plugins/**/*")]
            paths += [engine.path for engine in engines.values()]
        files = {
            path.relative_to(model.folder).as_posix(): path.read_bytes()
            for path in paths
            if path.is_file()
        }
        packed[run] = (replace(candidate, model=model), files)
    # As many threads of PyTorch as here, so that sums are split there as here.
    return partial(_open_portable, packed, torch.get_num_threads())


@contextlib.contextmanager
def _open_portable(
    packed: Mapping[str, tuple[Candidate, Mapping[str, bytes]]], threads: int
) -> Iterator[dict[str, Runner]]:
    import torch

    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory(prefix="tome-export-") as name:
        arrived = {}
        for number, (run, (candidate, files)) in enumerate(packed.items()):
            folder = Path(name) / str(number)
            for path, content in files.items():
                (folder / path).parent.mkdir(parents=True, exist_ok=True)
                (folder / path).write_bytes(content)
            engines = {
                name: replace(engine, path=folder / engine.path.name)
                for name, engine in candidate.model.engines.items()
            }
            model = replace(candidate.model, folder=folder, graph=folder / MODEL, engines=engines)
            arrived[run] = replace(candidate, model=model)
        with open_runners(arrived, Silent()) as runners:
            yield runners
