"""A model that a command runs: what an artifact holds, or a variant of it, on any backend."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from tome_export.artifact import MODEL, Artifact
from tome_export.engine import EngineOptions
from tome_export.engine.build import Plugins, build_engine, plugins_of
from tome_export.progress import Progress
from tome_export.runtime.inputs import extra_inputs
from tome_export.runtime.reference import export_variant
from tome_export.runtime.registry import backend_of
from tome_export.runtime.runner import EngineFile, Runnable, Runner
from tome_export.spec import BatchRange

if TYPE_CHECKING:
    from tome_export.patch import MergedModel


@dataclass(frozen=True, kw_only=True)
class Subject(Runnable):
    """A source, with all that is needed to build an engine of it and to feed it.

    Attributes:
        folder: Holds ``model.onnx`` and, with the plugin, its kernels.
        batch: Batch sizes it takes.
        plugins: Those of the model; None if it has none.
        further: Inputs besides the images: shape of each without the batch.
    """

    folder: Path
    batch: BatchRange
    plugins: Plugins | None = None
    further: Mapping[str, tuple[int, ...]] = field(default_factory=dict)


def subject_of(artifact: Artifact, label: str, module: MergedModel | None = None) -> Subject:
    """What an artifact holds, and its model in PyTorch if there is need of it.

    Raises:
        InputError: if its graph asks for more memory than this machine has.
    """
    from tome_export.onnx.files import check_memory

    check_memory(artifact.model_path)
    manifest = artifact.manifest
    return Subject(
        label=label,
        folder=artifact.path,
        graph=artifact.model_path,
        precision=manifest.precision,
        output_name=manifest.output.name,
        batch=manifest.batch,
        engines={
            name: EngineFile(artifact.path / engine.file, engine.version_compatible)
            for name, engine in manifest.engines.items()
        },
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
    with tempfile.TemporaryDirectory(prefix="tome-export-") as name:
        folder = Path(name)
        kernels = export_variant(artifact, module, folder, progress)
        yield replace(
            subject_of(artifact, label, module),
            folder=folder,
            graph=folder / MODEL,
            engines={},
            plugins=None if kernels is None else Plugins(2 * len(module.steps), kernels.kernels),
            further=module.extra_inputs,
        )


def with_engine(name: str, subject: Subject, folder: Path, progress: Progress) -> Subject:
    """The subject with an engine for the backend, built if it has none and needs one.

    Args:
        name: Of the backend.
        subject: What is to be run; a graph that is no file is written to the folder.
        folder: For the engine.
        progress: Told of the build.

    Raises:
        MissingComponentError: if the backend cannot build here.
        ExportError: if it refuses the model.
    """
    builder = backend_of(name).builder
    if builder is None or name in subject.engines or subject.graph is None:
        return subject
    progress.detail(f"building a {name} engine of {subject.label}")
    model = subject.graph
    if not isinstance(model, Path):
        from tome_export.onnx.files import save

        model = save(model, folder / MODEL)[0]
    build_engine(
        builder,
        subject.folder,
        EngineOptions(batch=subject.batch),
        progress,
        folder,
        plugins=subject.plugins,
        model=model,
    )
    engine = EngineFile(folder / builder.file_name)
    return replace(subject, engines={**subject.engines, name: engine})


@contextlib.contextmanager
def open_runner(name: str, subject: Subject, progress: Progress) -> Iterator[Runner]:
    """Load a model on a backend; where it has no engine for one, that is built first.

    Args:
        name: Of the backend.
        subject: What to run.
        progress: Told of an engine build.

    Raises:
        MissingComponentError: if the backend cannot run here.
        InputError: if the subject lacks what the backend opens.
        ExportError: if the backend refuses the model.
    """
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="tome-export-"))
        ready = with_engine(name, subject, Path(folder), progress)
        yield stack.enter_context(backend_of(name).open(ready))
