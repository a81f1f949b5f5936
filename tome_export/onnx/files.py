"""Reading, checking and writing ONNX files, with external data above protobuf's limit."""

from __future__ import annotations

import contextlib
import errno
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from tome_export.errors import ExportError, InputError

EXTERNAL_DATA_BYTES = 1_900_000_000
"""Weights above this go to ``model.onnx.data``; protobuf's limit is 2 GiB for the whole file."""


def weight_bytes(model: onnx.ModelProto) -> int:
    """Bytes of all initializers held inside the model."""
    return sum(len(tensor.raw_data) for tensor in model.graph.initializer)


def save(model: onnx.ModelProto, path: Path, *, threshold: int = EXTERNAL_DATA_BYTES) -> list[Path]:
    """Write the model, and its weights beside it when they exceed ``threshold`` bytes.

    A file of weights left by an earlier save is removed. The model is not changed.

    Returns:
        The files written, model first.
    """
    data = path.with_name(path.name + ".data")
    external = weight_bytes(model) > threshold
    # onnx appends to a data file that is there.
    data.unlink(missing_ok=True)
    onnx.save(
        model,
        path,
        save_as_external_data=external,
        all_tensors_to_one_file=True,
        location=data.name,
        size_threshold=1024,
    )
    if external:
        # onnx takes the weights out of the model it saves.
        onnx.load_external_data_for_model(model, str(path.parent))
    return [path, data] if external else [path]


def load(path: Path, *, weights: bool = True) -> onnx.ModelProto:
    """Read a model file.

    Raises:
        InputError: if the file is not an ONNX model.
    """
    try:
        return onnx.load(path, load_external_data=weights)
    except Exception as error:
        raise InputError(
            f"{path} is not a readable ONNX model ({type(error).__name__}); rebuild the artifact"
        ) from error


def check(path: Path) -> None:
    """Run ONNX's checker with full shape inference and require a shape for every tensor.

    Raises:
        ExportError: if the model is not valid ONNX or a shape could not be inferred.
        OSError: if the disk is full.
    """
    try:
        onnx.checker.check_model(str(path), full_check=True)
        inferred = path.with_name(path.name + ".inferred")
        try:
            onnx.shape_inference.infer_shapes_path(
                str(path), str(inferred), check_type=True, strict_mode=True, data_prop=True
            )
            graph = onnx.load(inferred, load_external_data=False).graph
        except DecodeError as error:
            # The writer, which is C++, says nothing of a full disk.
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(inferred)) from error
        finally:
            inferred.unlink(missing_ok=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ExportError(f"the exported model is not valid ONNX: {error}") from error
    known = {
        value.name
        for value in (*graph.value_info, *graph.output)
        if value.type.tensor_type.HasField("shape")
    }
    unknown = [name for node in graph.node for name in node.output if name and name not in known]
    if unknown:
        raise ExportError(
            f"shape inference found no shape for {len(unknown)} tensors, first {unknown[0]!r}"
        )


@contextlib.contextmanager
def serialized(model: onnx.ModelProto) -> Iterator[bytes | str]:
    """The model in a form that ONNX Runtime loads: bytes, or a temporary file above 2 GB."""
    if weight_bytes(model) <= EXTERNAL_DATA_BYTES:
        yield model.SerializeToString()
        return
    with tempfile.TemporaryDirectory(prefix="tome-export-") as folder:
        yield str(save(model, Path(folder) / "model.onnx")[0])
