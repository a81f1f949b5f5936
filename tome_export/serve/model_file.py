"""Which file of an artifact the server loads, and what it takes and gives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from tome_export.artifact import MODEL, Artifact, Manifest
from tome_export.artifact.manifest import Tensor
from tome_export.errors import InputError, UsageError
from tome_export.spec import BatchRange, TensorInfo

Format = Literal["auto", "engine", "onnx"]
FORMATS: tuple[Format, ...] = get_args(Format)

TENSORRT, RTX = "tensorrt", "tensorrt-rtx"

NO_RTX = "Triton Inference Server has no backend for TensorRT-RTX engines"


@dataclass(frozen=True)
class ModelFile:
    """The TensorRT engine or the ONNX model of an artifact, as the server is to load it.

    Attributes:
        platform: The server's name for its kind.
        files: Name in the version folder -> file of the artifact.
        inputs: Tensors by name, dtype and shape; ``-1`` is the batch.
        outputs: Likewise.
        scatters: Whether its merge is one that TensorRT's parser refuses.
        version_compatible: Whether it is an engine that brings a runtime of its own.
        cuda_graphs: Whether its batches may be recorded as CUDA graphs.
        needs_gpu: Whether it runs on GPUs only.
    """

    platform: Literal["tensorrt_plan", "onnxruntime_onnx"]
    files: Mapping[str, Path]
    batch: BatchRange
    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]
    scatters: bool
    labels: tuple[str, ...]
    version_compatible: bool = False
    cuda_graphs: bool = True
    needs_gpu: bool = False
    notes: tuple[str, ...] = ()


def model_file_from_artifact(artifact: Artifact, choice: str = "auto") -> ModelFile:
    """Choose the file to serve; ``auto`` takes the TensorRT engine where there is one.

    An engine with plugins that was built for a range of batch sizes is given only the one it is
    tuned for.
    """
    if choice not in FORMATS:
        raise UsageError(f"format is {choice!r}; expected one of {', '.join(FORMATS)}")
    manifest, notes = artifact.manifest, []
    engine = None if choice == "onnx" else manifest.engines.get(TENSORRT)
    if engine is not None and engine.stripped:
        line = (
            f"the engine in {artifact.path} has no weights (--strip-weights), and tritonserver "
            "gives it none"
        )
        if choice == "engine":
            raise InputError(f"{line}; build one with weights, or serve the ONNX model")
        notes.append(f"{line}: the ONNX model is served")
        engine = None
    if choice == "engine" and engine is None:
        raise InputError(_no_engine(artifact))
    batch = engine.batch if engine else manifest.batch
    leaks = engine is not None and manifest.merge.merge_op == "plugin" and not batch.is_static
    if leaks:
        notes.append(
            f"The engine has plugins and was built for batches of {batch}: it is given batches of "
            f"exactly {batch.opt}, as TensorRT keeps memory at every change of the batch of such a "
            "plugin (NVIDIA/TensorRT issue 4849), and is not recorded as a CUDA graph"
        )
        batch = BatchRange(batch.opt, batch.opt, batch.opt)
    if engine:
        files = {"model.plan": artifact.path / engine.file}
        if batch.min > 1 and not batch.is_static:
            raise InputError(
                f"the engine in {artifact.path} takes batches of {batch.min} or more, and a server "
                "sends single requests too; build it with --batch "
                f"1:{batch.opt}:{batch.max}, or serve the ONNX model with --format onnx"
            )
    else:
        names = [name for name in manifest.files if name in (MODEL, f"{MODEL}.data")]
        files = {name: artifact.path / name for name in names}
        if choice == "auto" and RTX in manifest.engines:
            notes.append(f"{NO_RTX}: the ONNX model is served")
        if note := _attention_note(manifest):
            notes.append(note)
    return ModelFile(
        platform="tensorrt_plan" if engine else "onnxruntime_onnx",
        files=files,
        batch=batch,
        inputs=_with_batch(manifest.inputs, batch),
        outputs=_with_batch(manifest.outputs, batch),
        scatters=manifest.merge.merge_op == "index_add",
        # One line each: a name with a line end in it would shift all those after it.
        labels=tuple(" ".join(label.split()) for label in manifest.labels or ()),
        version_compatible=engine is not None and engine.version_compatible,
        cuda_graphs=not leaks,
        needs_gpu=engine is not None or manifest.precision == "bf16",
        notes=tuple(notes),
    )


def _with_batch(tensors: Sequence[Tensor], batch: BatchRange) -> tuple[TensorInfo, ...]:
    rows = batch.max if batch.is_static else -1
    return tuple(TensorInfo(t.name, (rows, *image_shape(t)), t.dtype) for t in tensors)


def image_shape(tensor: Tensor) -> tuple[int, ...]:
    """The shape of a tensor for one image or video."""
    return tuple(int(size) for size in tensor.shape[1:])


def _attention_note(manifest: Manifest) -> str:
    """Which servers with GPUs run the attention of an ONNX model right; empty if all do."""
    form = manifest.onnx.attention
    if form == "fused-fp32":
        return (
            "The ONNX model has fused attention summed in float32, which ONNX Runtime does not run "
            "on a GPU: rebuild the artifact with --attention parts, or see docs/attention.md"
        )
    if form == "fused":
        return (
            "The ONNX model has fused attention: on a GPU let the server have ONNX Runtime 1.27 or "
            "later, or rebuild the artifact with --attention parts (docs/attention.md)"
        )
    return ""


def _no_engine(artifact: Artifact) -> str:
    fix = (
        f"build one with 'tome-export engine {artifact.path} --engine tensorrt' on the GPU that "
        "will serve it, or serve the ONNX model with --format onnx"
    )
    if RTX in artifact.manifest.engines:
        return f"the only engine in {artifact.path} is of TensorRT-RTX: {NO_RTX}; {fix}"
    return f"{artifact.path} has no engine; {fix}"
