"""Everything that can run a model for ``bench``, ``eval`` and ``tune``, by its name."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tome_export.artifact import MODEL, Artifact
from tome_export.engine import EngineOptions
from tome_export.engine.select import BACKENDS as ENGINES
from tome_export.errors import InputError, MissingComponentError, UsageError
from tome_export.pipeline.engine import build_engine
from tome_export.pipeline.inputs import extra_inputs
from tome_export.pipeline.kernels import Plugins
from tome_export.pipeline.reference import export_variant
from tome_export.progress import Progress
from tome_export.spec import BatchRange

if TYPE_CHECKING:
    from tome_export.patch import MergedModel
    from tome_export.runtime.runner import Runner

ORT_CPU, ORT_CUDA, TORCH = "ort-cpu", "ort-cuda", "torch"

NAMES = (ORT_CPU, ORT_CUDA, *(engine.name for engine in ENGINES), TORCH)
"""Backends, in the order in which they are shown."""


@dataclass(frozen=True)
class Subject:
    """A model that backends can run.

    Attributes:
        label: For people: ``merged``, ``unmerged``, or the path of an artifact.
        folder: Holds ``model.onnx`` and, with the plugin, its kernels.
        precision: Of the model.
        output_name: Of the model's one output.
        batch: Batch sizes it takes.
        engines: Ready engine files by backend.
        version_compatible: Backends whose ready engine was built so, by the artifact's manifest.
        plugins: Those of the model; None if it has none.
        module: The same in PyTorch, fp32; None where only graphs are to be run.
        further: Inputs besides the images: shape of each without the batch.
    """

    label: str
    folder: Path
    precision: str
    output_name: str
    batch: BatchRange
    engines: Mapping[str, Path] = field(default_factory=dict)
    version_compatible: frozenset[str] = frozenset()
    plugins: Plugins | None = None
    module: MergedModel | None = None
    further: Mapping[str, tuple[int, ...]] = field(default_factory=dict)


def subject_of(artifact: Artifact, label: str, module: MergedModel | None = None) -> Subject:
    """What an artifact holds, and its model in PyTorch if there is need of it."""
    from tome_export.pipeline.kernels import plugins_of

    manifest = artifact.manifest
    return Subject(
        label=label,
        folder=artifact.path,
        precision=manifest.precision,
        output_name=manifest.output.name,
        batch=manifest.batch,
        engines={name: artifact.path / e["file"] for name, e in manifest.engines.items()},
        version_compatible=frozenset(
            name for name, e in manifest.engines.items() if e.get("version_compatible")
        ),
        plugins=plugins_of(manifest),
        module=module,
        further=extra_inputs(manifest),
    )


@contextlib.contextmanager
def variant(
    artifact: Artifact, label: str, module: MergedModel, progress: Progress
) -> Iterator[Subject]:
    """The artifact's model at another schedule, in a temporary folder.

    Args:
        artifact: Whose build to repeat.
        label: For people.
        module: From ``pipeline.reference.rescheduled``.
        progress: Told what happens.
    """
    manifest = artifact.manifest
    with tempfile.TemporaryDirectory(prefix="tome-export-") as name:
        folder = Path(name)
        kernels = export_variant(artifact, module, folder, progress)
        plugins = None
        if kernels is not None:
            plugins = Plugins(2 * len(module.steps), tuple(kernels["kernels"]))
        yield Subject(
            label=label,
            folder=folder,
            precision=manifest.precision,
            output_name=manifest.output.name,
            batch=manifest.batch,
            plugins=plugins,
            module=module,
            further=module.extra_inputs,
        )


def missing(name: str) -> str | None:
    """Why a backend cannot run here, and what to do; None if it can.

    Raises:
        UsageError: if there is no such backend.
    """
    from tome_export.runtime import ort

    if name not in NAMES:
        raise UsageError(f"backend is {name!r}; expected one of {', '.join(NAMES)}")
    if name == TORCH:
        return None
    if name in (ORT_CPU, ORT_CUDA):
        return ort.missing("cpu" if name == ORT_CPU else "cuda")
    run = next(engine for engine in ENGINES if engine.name == name).can_run()
    return None if run.available else run.reason


def require(names: Sequence[str]) -> None:
    """Check that backends exist and can run here, before any work is done.

    Raises:
        UsageError: if there is no such backend, or one is named twice.
        MissingComponentError: if one cannot run here.
    """
    for name in names:
        if names.count(name) > 1:
            raise UsageError(f"backend {name} is named twice; name each once")
        reason = missing(name)
        if reason is not None:
            raise MissingComponentError(reason)


@contextlib.contextmanager
def open_runner(
    name: str, subject: Subject, progress: Progress, profile: Path | None = None
) -> Iterator[Runner]:
    """Load a model on a backend; where it has no engine for one, that is built first.

    Args:
        name: One of ``NAMES``.
        subject: What to run.
        progress: Told of an engine build.
        profile: Prefix of ONNX Runtime's profile file; then an ``OrtRunner`` is given.

    Raises:
        MissingComponentError: if the backend cannot run here.
        InputError: if the subject has no PyTorch model and that is asked for.
        ExportError: if the backend refuses the model.
    """
    runner: Any
    if name == TORCH:
        from tome_export.onnx.export import in_precision
        from tome_export.runtime.torch_runner import TorchRunner

        if subject.module is None:
            raise InputError(f"{subject.label} has no PyTorch model; choose another backend")
        precision: Any = subject.precision
        with TorchRunner(in_precision(subject.module, precision), subject.output_name) as runner:
            yield runner
        return
    if name in (ORT_CPU, ORT_CUDA):
        from tome_export.onnx.files import load
        from tome_export.runtime.ort import OrtRunner

        model = load(subject.folder / MODEL)
        with OrtRunner(model, "cpu" if name == ORT_CPU else "cuda", profile=profile) as runner:
            del model
            yield runner
        return
    engine = next(engine for engine in ENGINES if engine.name == name)
    with contextlib.ExitStack() as stack:
        file = subject.engines.get(name)
        if file is None:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="tome-export-"))
            progress.detail(f"building a {name} engine of {subject.label}")
            options = EngineOptions(batch=subject.batch)
            build_engine(
                engine, subject.folder, options, progress, Path(folder), plugins=subject.plugins
            )
            file = Path(folder) / engine.file_name
        compatible = name in subject.version_compatible
        yield stack.enter_context(engine.runner(file, version_compatible=compatible))
