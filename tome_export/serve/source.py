"""Which file of an artifact is served, and what goes into and comes out of it."""

from __future__ import annotations

import re
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

Platform = Literal["tensorrt_plan", "onnxruntime_onnx"]

TENSORRT, RTX = "tensorrt", "tensorrt-rtx"

NO_RTX = "Triton Inference Server has no backend for TensorRT-RTX engines"

MAX_NAME = 128
"""Longest name of a model: names of the models around it, and of files, are longer."""

FIXED = "_fixed"
"""What is added to the name of a model of one batch size: the model itself takes that name, and the
batching model, which fills requests up to that size, the name without it."""

RESERVED = ("_preprocess", "_postprocess", "_pipeline", "_router", "_cascade", FIXED)
"""How the names of the models around a model end."""


@dataclass(frozen=True)
class Source:
    """What is served.

    Attributes:
        platform: What the server loads it as.
        files: Name in the version folder -> file of the artifact.
        batch: Batch sizes that it is given.
        inputs: By name, dtype and shape; ``-1`` is the batch.
        outputs: Likewise.
        scatters: Whether its merge is one that TensorRT's parser refuses.
        labels: Class names, if it has some.
        version_compatible: Whether it is an engine that brings a runtime of its own, for servers
            of later TensorRT versions.
        cuda_graphs: Whether its batches may be recorded as CUDA graphs.
        notes: What a user should know of the choice.
    """

    platform: Platform
    files: Mapping[str, Path]
    batch: BatchRange
    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]
    scatters: bool
    labels: tuple[str, ...]
    version_compatible: bool = False
    cuda_graphs: bool = True
    notes: tuple[str, ...] = ()


def source_from_artifact(artifact: Artifact, choice: str = "auto") -> Source:
    """Choose the file to serve.

    ``auto`` takes the TensorRT engine where there is one, else the ONNX model. An engine with
    plugins that was built for a range of batch sizes is given only the one it is tuned for.

    Raises:
        UsageError: if the choice is unknown.
        InputError: if an engine is asked for and there is none that the server takes, or the
            engine's batch sizes are ones that the server cannot keep to.
    """
    if choice not in FORMATS:
        raise UsageError(f"format is {choice!r}; expected one of {', '.join(FORMATS)}")
    manifest = artifact.manifest
    engine = None if choice == "onnx" else manifest.engines.get(TENSORRT)
    if choice == "engine" and engine is None:
        raise InputError(_no_engine(artifact))
    batch = engine.batch if engine else manifest.batch
    notes = []
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
        notes += filter(None, [_attention_note(manifest)])
    return Source(
        platform="tensorrt_plan" if engine else "onnxruntime_onnx",
        files=files,
        batch=batch,
        inputs=_served(manifest.inputs, batch),
        outputs=_served(manifest.outputs, batch),
        scatters=manifest.merge.merge_op == "index_add",
        # One line each: a name with a line end in it would shift all those after it.
        labels=tuple(" ".join(label.split()) for label in manifest.labels or ()),
        version_compatible=engine is not None and engine.version_compatible,
        cuda_graphs=not leaks,
        notes=tuple(notes),
    )


def _served(tensors: Sequence[Tensor], batch: BatchRange) -> tuple[TensorInfo, ...]:
    rows = batch.max if batch.is_static else -1
    return tuple(TensorInfo(t.name, (rows, *sizes(t)), t.dtype) for t in tensors)


def sizes(tensor: Tensor) -> tuple[int, ...]:
    """The shape of a tensor for one image or video."""
    return tuple(int(size) for size in tensor.shape[1:])


def _attention_note(manifest: Manifest) -> str:
    """Which servers with GPUs run the attention of an ONNX model right; empty if all do.

    Source: docs/attention.md.
    """
    form = manifest.onnx.attention
    if form == "parts":
        return ""
    if manifest.merge.merge_op == "index_add":
        where = "ONNX Runtime runs all of this model on a GPU"
    else:
        where = "What TensorRT leaves of it on a GPU (all before 10.14) ONNX Runtime runs"
    if form == "fused-fp32":
        return (
            f"The ONNX model has fused attention summed in float32. {where}, whose CUDA provider "
            "does not take that: rebuild the artifact with --attention parts if the server's "
            "TensorRT does not"
        )
    return (
        f"The ONNX model has fused attention. {where}: before 1.25 on the CPU, and 1.25 and 1.26 "
        "may crash where a layer has N % 8 = 4 tokens; let the server have ONNX Runtime 1.27 or "
        "later, or rebuild the artifact with --attention parts"
    )


def default_name(manifest: Manifest) -> str:
    """``<model>_r<r>``, with r as the schedule has it, such as ``vit_digits_r8``."""
    schedule, _, frames = manifest.merge.schedule.partition("; ")
    merged = re.fullmatch(r"r=(\d+) (.+)", schedule)
    if merged is None:
        r = schedule.replace(",", "-")
    else:
        r = merged[1] if merged[2] == "constant" else f"{merged[1]}-{merged[2]}"
    r = f"{r}-across" if frames else r
    return f"{plain_name(manifest.model.name)}_r{plain_name(r)}"


def plain_name(text: str) -> str:
    """A name that the server takes, made of any text."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "_", text).lstrip(".") or "model"


def check_name(name: str) -> None:
    """Refuse what is no name of a model.

    Raises:
        UsageError: if it is none.
    """
    if not re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9_.-]*", name):
        raise UsageError(
            f"model name is {name!r}; expected letters, digits, _, - and ., such as vit_b16_r8"
        )
    if len(name) > MAX_NAME:
        raise UsageError(
            f"model name has {len(name)} characters; expected {MAX_NAME} or fewer, give a shorter "
            "one with --name"
        )


def check_free_name(name: str) -> None:
    """Refuse what is no name that a user may choose: we add some ends of names ourselves.

    Raises:
        UsageError: if it is none.
    """
    check_name(name)
    end = next((end for end in RESERVED if name.endswith(end)), None)
    if end is not None:
        raise UsageError(
            f"model name is {name!r}; names that end in {end} are given to models made around a "
            f"model, choose one such as {name.removesuffix(end) or 'vit_b16'}"
        )


def _no_engine(artifact: Artifact) -> str:
    fix = (
        f"build one with 'tome-export engine {artifact.path} --engine tensorrt' on the GPU that "
        "will serve it, or serve the ONNX model with --format onnx"
    )
    if RTX in artifact.manifest.engines:
        return f"the only engine in {artifact.path} is of TensorRT-RTX: {NO_RTX}; {fix}"
    return f"{artifact.path} has no engine; {fix}"
