"""``tome-export engine``: an engine for a ready artifact, built where it will run; no torch."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from tome_export.artifact import Artifact, Manifest, writing_to
from tome_export.engine import EngineOptions, limits, select
from tome_export.engine.build import build_engine, plugins_of
from tome_export.errors import InputError, MissingComponentError, UsageError
from tome_export.progress import Progress, Silent
from tome_export.spec import OPSETS, AttentionForm, BatchRange, Precision

if TYPE_CHECKING:
    from tome_export.engine import EngineBuilder
    from tome_export.onnx.functions import Lowering

ATTENTION_SINCE = (10, 14)
"""First TensorRT whose parser knows ONNX's Attention operator."""

FP32_SUMS_SINCE = (11, 3)
"""First TensorRT that fuses half-precision attention cast up to float32 (its release notes)."""


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
    if refusal := _attention_refusal(artifact.manifest.onnx.attention, selection.builder):
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
        limits.merges_of(manifest.layers, merge.prefix),
        class_token=merge.class_token,
        scored=merge.scored,
        plugin=merge.merge_op == "plugin",
    )


@dataclass(frozen=True)
class AttentionDecision:
    """How attention is written into the graph, and one line that says why."""

    form: AttentionForm
    reason: str


def attention_form(
    asked: AttentionForm,
    precision: Precision,
    backend: EngineBuilder | None,
    lowering: Lowering,
    opset: int = OPSETS[-1],
) -> AttentionDecision:
    """The form of attention for what will run the graph; docs/attention.md says why.

    Args:
        asked: ``auto`` leaves it to this function.
        precision: Of the graph.
        backend: That builds the engine; None for no engine.
        lowering: Of the merge: a graph with ``index_add`` is for ONNX Runtime alone.
        opset: Of the graph; that it has the form asked for is ``spec.check_opset``'s to say.

    Raises:
        UsageError: if what was asked for does not go with the precision or the backend.
    """
    if asked == "fused-fp32" and precision != "fp16":
        raise UsageError(
            f"--attention fused-fp32 was asked for in {precision}; expected fp16, the precision "
            "in which fused attention may sum in less than float32: use --attention auto"
        )
    if asked != "auto":
        if refusal := _attention_refusal(asked, backend):
            raise UsageError(refusal)
        reason, version = "as asked", _tensorrt_version(backend)
        if asked == "fused-fp32" and version is not None and version < FP32_SUMS_SINCE:
            reason += f"; TensorRT older than {_text(FP32_SUMS_SINCE)} computes it unfused"
        return AttentionDecision(asked, reason)
    if precision == "fp32":
        return AttentionDecision("parts", "TensorRT has no fused kernel in fp32")
    if opset < OPSETS[-1]:
        return AttentionDecision("parts", f"opset {opset} has no operator for it")
    if backend is not None:
        if _attention_refusal("fused", backend):
            least = _text(ATTENTION_SINCE)
            return AttentionDecision("parts", f"TensorRT older than {least} has no such operator")
        return AttentionDecision("fused", f"{backend.name} has a fused kernel for it")
    if lowering == "index_add":
        return AttentionDecision("parts", "only ONNX Runtime takes a graph with index_add")
    from tome_export.runtime.ort import missing

    if missing("cuda") is None:
        return AttentionDecision(
            "parts", "ONNX Runtime's CUDA provider is here, where parts run in every version"
        )
    return AttentionDecision("fused", "engines can be built from it elsewhere")


def _attention_refusal(form: AttentionForm, backend: EngineBuilder | None) -> str | None:
    """Why a backend's parser does not take a form of attention; None if it does."""
    version = _tensorrt_version(backend)
    if form == "parts" or version is None or version >= ATTENTION_SINCE:
        return None
    return (
        f"attention is {form}, an operator that TensorRT {_text(version)} does not know (expected "
        f"{_text(ATTENTION_SINCE)} or later); build with --attention parts"
    )


def _tensorrt_version(backend: EngineBuilder | None) -> tuple[int, ...] | None:
    """Major and minor version of TensorRT; None for another backend or none."""
    if backend is None or backend.name != "tensorrt":
        return None
    return tuple(int(part) for part in (backend.availability().version or "0.0").split(".")[:2])


def _text(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))
