"""``tome-export engine``: an engine for a ready artifact, built where it will run; no torch."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from tome_export.artifact import Artifact, Manifest, writing_to
from tome_export.build.form import attention_refusal
from tome_export.engine import EngineOptions, limits, select
from tome_export.engine.build import build_engine, plugins_of
from tome_export.errors import InputError, MissingComponentError
from tome_export.progress import Progress, Silent
from tome_export.spec import BatchRange

if TYPE_CHECKING:
    from tome_export.engine import EngineBuilder


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
        InputError: if the artifact is damaged or cannot be written, its merge or attention is one
            that the engine's parser does not take, or the batch range is outside that of its model.
        MissingComponentError: if no engine can be built here.
        ExportError: if the build fails; the artifact is then as it was.
    """
    progress = progress or Silent()
    progress.stage("Verify the artifact")
    artifact = Artifact.open(request.artifact.absolute())
    if artifact.manifest.merge.merge_op == "index_add":
        raise InputError(
            "the artifact was built with --merge-op index_add, which TensorRT's parser refuses; "
            "rebuild it with --merge-op matmul"
        )
    selection = select(request.engine)
    if selection.builder is None:
        raise MissingComponentError(selection.line)
    if refusal := attention_refusal(artifact.manifest.onnx.attention, selection.builder):
        raise InputError(f"the artifact's {refusal}")
    if refusal := _length_refusal(artifact.manifest, selection.builder):
        raise InputError(f"the artifact cannot become an engine: {refusal}")
    built = artifact.manifest.batch
    batch = request.batch or built
    if batch.min < built.min or batch.max > built.max:
        raise InputError(
            f"batch range is {batch}; the artifact's model takes {built}, choose one inside it or "
            "rebuild the artifact"
        )
    from tome_export.onnx.files import check_memory

    check_memory(artifact.model_path)
    options = replace(request.options, batch=batch)
    progress.stage(f"Build the {selection.builder.name} engine")
    with (
        writing_to(artifact.path),
        tempfile.TemporaryDirectory(dir=artifact.path, prefix=".engine-") as folder,
    ):
        info = build_engine(
            selection.builder,
            artifact.path,
            options,
            progress,
            Path(folder),
            plugins=plugins_of(artifact.manifest),
        )
        return artifact.with_engine(info, Path(folder) / info.file, selection.line)


def _length_refusal(manifest: Manifest, backend: EngineBuilder) -> str | None:
    """Why a model's sequences are too long for the operators of a backend; None if they are not."""
    merge = manifest.merge
    return limits.refusal(
        backend.name,
        limits.merges_of([layer.counts for layer in manifest.layers], merge.prefix),
        class_token=merge.class_token,
        scored=merge.scored,
        plugin=merge.merge_op == "plugin",
    )
