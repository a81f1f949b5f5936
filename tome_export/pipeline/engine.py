"""``tome-export engine``: an engine for a ready artifact, built where it will run; no torch."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from tome_export.artifact import MODEL, Artifact, writing_to
from tome_export.engine import EngineOptions, select
from tome_export.errors import InputError, MissingComponentError
from tome_export.pipeline.kernels import check_plugin_layers, plugins_of, register_plugins
from tome_export.pipeline.progress import Progress, Silent
from tome_export.spec import BatchRange

if TYPE_CHECKING:
    from tome_export.engine import Backend, EngineInfo
    from tome_export.onnx.export import AttentionForm
    from tome_export.pipeline.kernels import Plugins

ATTENTION_SINCE = (10, 14)
"""First TensorRT whose parser knows ONNX's Attention operator."""


@dataclass(frozen=True)
class EngineRequest:
    """Which engine to build.

    Attributes:
        artifact: The artifact directory.
        engine: ``auto``, ``tensorrt`` or ``tensorrt-rtx``.
        options: Engine settings; their batch range is replaced by ``batch``.
        batch: Optimisation profile; None for the artifact's own range.
    """

    artifact: Path
    engine: str = "auto"
    options: EngineOptions = field(default_factory=EngineOptions)
    batch: BatchRange | None = None


def add_engine(request: EngineRequest, progress: Progress | None = None) -> Artifact:
    """Build an engine from an artifact's ONNX model and add it to the artifact.

    Raises:
        InputError: if the artifact is damaged or cannot be written, its merge is one that no engine
            takes, or the batch range is outside that of its model.
        MissingComponentError: if no engine can be built here.
        ExportError: if the build fails; the artifact is then as it was.
    """
    progress = progress or Silent()
    progress.stage("Verify the artifact")
    artifact = Artifact.open(request.artifact.absolute())
    if artifact.manifest["merge"]["merge_op"] == "index_add":
        raise InputError(
            "the artifact was built with --merge-op index_add, which TensorRT's parser refuses; "
            "rebuild it with --merge-op matmul"
        )
    selection = select(request.engine)
    if selection.backend is None:
        raise MissingComponentError(selection.line)
    built = BatchRange.parse(artifact.manifest["batch"])
    batch = request.batch or built
    if batch.min < built.min or batch.max > built.max:
        raise InputError(
            f"batch range is {batch}; the artifact's model takes {built}, choose one inside it or "
            "rebuild the artifact"
        )
    options = replace(request.options, batch=batch)
    progress.stage(f"Build the {selection.backend.name} engine")
    with (
        writing_to(artifact.path),
        tempfile.TemporaryDirectory(dir=artifact.path, prefix=".engine-") as folder,
    ):
        info = build_engine(
            selection.backend,
            artifact.path,
            options,
            progress,
            Path(folder),
            plugins=plugins_of(artifact.manifest),
        )
        changes = {"engines": {info.backend: info.to_dict()}, "engine_note": selection.line}
        return artifact.with_files(changes, {info.file: Path(folder) / info.file})


def build_engine(
    backend: Backend,
    artifact: Path,
    options: EngineOptions,
    progress: Progress,
    folder: Path | None = None,
    *,
    plugins: Plugins | None = None,
) -> EngineInfo:
    """Build from ``artifact/model.onnx`` into ``folder`` (by default the artifact itself).

    Args:
        backend: That builds it.
        artifact: Directory with the model, and the kernels if it has plugin nodes.
        options: How to build.
        progress: Told the notes.
        folder: Where the engine goes.
        plugins: Those of the model; None if it has none.

    Raises:
        InputError: if no kernel of the artifact runs on this machine's GPU.
        MissingComponentError: if the backend cannot build here.
        ExportError: if it refuses the model.
    """
    if plugins:
        register_plugins(backend, artifact, plugins.kernels, options)
    output = (folder or artifact) / backend.file_name
    info = backend.build(artifact / MODEL, options, output, progress.detail)
    if plugins:
        check_plugin_layers(info, plugins.nodes)
    for note in info.notes:
        progress.detail(note)
    return info


def attention_form(backend: Backend | None) -> AttentionForm:
    """The form of attention that a backend parses."""
    if backend is None or backend.name != "tensorrt":
        return "auto"
    version = backend.availability().version or "0.0"
    parts = tuple(int(part) for part in version.split(".")[:2])
    return "auto" if parts >= ATTENTION_SINCE else "decomposed"
