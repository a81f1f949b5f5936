"""Reading, checking and writing ONNX files; large or shared weights are in a file beside them."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import math
import os
import tempfile
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import onnx
import psutil
from google.protobuf.message import DecodeError
from numpy.typing import NDArray
from onnx import NodeProto, numpy_helper

from tome_export.artifact.document import short
from tome_export.artifact.files import link_or_copy, open_regular
from tome_export.errors import ExportError, InputError
from tome_export.spec import INPUT_NAME

EXTERNAL_DATA_BYTES = 1_900_000_000
"""Weights above this go to ``model.onnx.data``; protobuf's limit is 2 GiB for the whole file."""

SMALL_BYTES = 1024
"""Weights below this stay in the model's own file."""

PAGE_BYTES = 4096
"""Weights in the other file begin at multiples of this, so that runtimes can map them."""

LARGE_BYTES = 1 << 28
"""Weights above this are not copied within memory where a file or a detour can do."""

HEAVY_BYTES = 1 << 16
"""Weights above this stay out of the hands of tools that copy them, in a large model."""

_GRAPH = onnx.ModelProto.DESCRIPTOR.fields_by_name["graph"].number
_INITIALIZER = onnx.GraphProto.DESCRIPTOR.fields_by_name["initializer"].number


def weight_bytes(model: onnx.ModelProto) -> int:
    """Bytes of all initializers held inside the model."""
    return sum(len(tensor.raw_data) for tensor in model.graph.initializer)


def data_of(path: Path) -> Path:
    """The file for the weights of a large model in this file."""
    return path.with_name(path.name + ".data")


def save(model: onnx.ModelProto, path: Path, *, threshold: int = EXTERNAL_DATA_BYTES) -> list[Path]:
    """Write the model, and its weights beside it when they exceed ``threshold`` bytes.

    A file of weights left by an earlier save is removed. The model is not changed. Returns the
    files, the model first.
    """
    data = data_of(path)
    data.unlink(missing_ok=True)
    if weight_bytes(model) <= threshold:
        _write(model, path, model.graph.initializer)
        return [path]
    with data.open("wb") as stream:
        _write(
            model, path, [_moved(tensor, stream, data.name) for tensor in model.graph.initializer]
        )
    return [path, data]


def _moved(tensor: onnx.TensorProto, stream: BinaryIO, location: str) -> onnx.TensorProto:
    """A tensor whose values are in a file, or the tensor itself if it is small."""
    if len(tensor.raw_data) < SMALL_BYTES:
        return tensor
    offset = _appended(tensor.raw_data, stream)
    return _reference(tensor, location=location, offset=offset, length=len(tensor.raw_data))


def _appended(values: bytes, stream: BinaryIO) -> int:
    """Write values at the next page of a file, and give the offset of that."""
    offset = -(-stream.tell() // PAGE_BYTES) * PAGE_BYTES
    stream.seek(offset)
    stream.write(values)
    return offset


def share_weights(paths: Sequence[Path]) -> int:
    """Have models of one origin keep their common weights in a file that is the same for all.

    What differs, such as embeddings of positions at other image sizes, stays in each model's own
    file. The file of weights lies beside each model, in the order of the weights' digests: it is
    byte for byte the same, and a hard link where the filesystem has such. Models that have nothing
    in common, or too much that differs for one file, are left as they are.

    Returns:
        Bytes of the common weights, which are stored once.
    """
    known, total = [], []
    for path in paths:
        weights = [t for t in load(path).graph.initializer if len(t.raw_data) >= SMALL_BYTES]
        known.append({tensor.name: _digest(tensor) for tensor in weights})
        total.append({known[-1][tensor.name]: len(tensor.raw_data) for tensor in weights})
    common = set.intersection(*({*digests.values()} for digests in known))
    own = max(sum(n for digest, n in sizes.items() if digest not in common) for sizes in total)
    if not common or own > EXTERNAL_DATA_BYTES:
        return 0
    places: dict[str, int] = {}
    for path, digests in zip(paths, known, strict=True):
        model, data = load(path), data_of(path)
        moved = {name: digest for name, digest in digests.items() if digest in common}
        tensors = model.graph.initializer
        data.unlink(missing_ok=True)
        if not places:
            by_digest = {digests[tensor.name]: tensor for tensor in tensors if tensor.name in moved}
            with data.open("wb") as stream:
                for digest in sorted(by_digest):
                    places[digest] = _appended(by_digest[digest].raw_data, stream)
        else:
            link_or_copy(data_of(paths[0]), data)
        written = [
            _reference(
                tensor,
                location=data.name,
                offset=places[moved[tensor.name]],
                length=len(tensor.raw_data),
            )
            if tensor.name in moved
            else tensor
            for tensor in tensors
        ]
        _write(model, path, written)
    return sum(total[0][digest] for digest in common)


def _digest(tensor: onnx.TensorProto) -> str:
    return hashlib.sha256(tensor.raw_data).hexdigest()


def _reference(tensor: onnx.TensorProto, **place: str | int) -> onnx.TensorProto:
    """A tensor without its values, which are in a file."""
    external = onnx.TensorProto.EXTERNAL
    found = onnx.TensorProto(
        name=tensor.name, dims=tensor.dims, data_type=tensor.data_type, data_location=external
    )
    for key, value in place.items():
        found.external_data.add(key=key, value=str(value))
    return found


def without_weights(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy of a model that lacks the initializers; they are never copied."""
    found = onnx.ModelProto()
    for message, copy in ((model, found), (model.graph, found.graph)):
        for field, value in message.ListFields():
            if field.name in ("graph", "initializer"):
                continue
            if hasattr(value, "extend"):
                getattr(copy, field.name).extend(value)
            elif field.message_type is not None:
                getattr(copy, field.name).CopyFrom(value)
            else:
                setattr(copy, field.name, value)
    return found


def _write(model: onnx.ModelProto, path: Path, tensors: Collection[onnx.TensorProto]) -> None:
    """Write a model with these initializers as one message, one after the other.

    Protobuf would build the whole message in memory, in a buffer that it doubles as it goes.
    """
    rest = without_weights(model)
    graph = rest.graph.SerializeToString()
    rest.ClearField("graph")
    sizes = [tensor.ByteSize() for tensor in tensors]
    length = len(graph) + sum(len(_head(_INITIALIZER, size)) + size for size in sizes)
    with path.open("wb") as stream:
        stream.write(rest.SerializeToString() + _head(_GRAPH, length) + graph)
        for tensor, size in zip(tensors, sizes, strict=True):
            stream.write(_head(_INITIALIZER, size) + tensor.SerializeToString())


def _head(field: int, length: int) -> bytes:
    """What comes before a message within a message: field, kind of value 2, length."""
    return _varint(field << 3 | 2) + _varint(length)


def _varint(value: int) -> bytes:
    """Seven bits a byte, the lowest first; all bytes but the last have their top bit set."""
    parts = []
    while value > 0x7F:
        parts.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*parts, value])


def load(path: Path, *, weights: bool = True) -> onnx.ModelProto:
    """Read a model file."""
    try:
        model = onnx.load(path, load_external_data=False)
        if weights:
            _read_weights(model, data_of(path))
        return model
    except Exception as error:
        raise InputError(
            f"{path} is not a readable ONNX model ({type(error).__name__}); rebuild the artifact"
        ) from error


def _read_weights(model: onnx.ModelProto, data: Path) -> None:
    """Put the weights of the file beside a model into it.

    ONNX's own reader refuses a file of several hard links, as it cannot know who made them.
    """
    outside = [t for t in model.graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL]
    if not outside:
        return
    with open_regular(data.parent, data.name) as stream:
        for tensor in outside:
            place = {entry.key: entry.value for entry in tensor.external_data}
            if place["location"] != data.name:
                raise ValueError(f"{tensor.name} is in {place['location']}")
            length = int(place["length"])
            stream.seek(int(place["offset"]))
            tensor.raw_data = stream.read(length)
            if len(tensor.raw_data) != length:
                raise ValueError(f"{tensor.name} is cut short")
            tensor.ClearField("external_data")
            tensor.ClearField("data_location")


def check(path: Path, model: onnx.ModelProto | None = None) -> None:
    """Run ONNX's checker with full shape inference and require a shape for every tensor."""
    bare, inferred = (path.with_name(path.name + end) for end in (".bare", ".inferred"))
    try:
        checked = path
        if model is not None and weight_bytes(model) > LARGE_BYTES:
            tensors = [
                _reference(t, location=path.name) if len(t.raw_data) > HEAVY_BYTES else t
                for t in model.graph.initializer
            ]
            _write(model, bare, tensors)
            checked = bare
        onnx.checker.check_model(str(checked), full_check=True)
        try:
            onnx.shape_inference.infer_shapes_path(
                str(checked), str(inferred), check_type=True, strict_mode=True, data_prop=True
            )
            graph = onnx.load(inferred, load_external_data=False).graph
        except DecodeError as error:
            # The writer, which is C++, says nothing of a full disk.
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(inferred)) from error
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ExportError(f"the exported model is not valid ONNX: {error}") from error
    finally:
        bare.unlink(missing_ok=True)
        inferred.unlink(missing_ok=True)
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


def check_memory(path: Path) -> None:
    """Refuse a model that asks for more memory than this machine has, before a runtime obeys.

    What can be told from its shapes: of the tensors between its nodes, the largest for one image.
    """
    model = load(path, weights=False)
    light = without_weights(model)
    for tensor in model.graph.initializer:
        if len(tensor.raw_data) < SMALL_BYTES and not tensor.external_data:
            light.graph.initializer.append(tensor)  # perhaps a shape
        else:
            weight = light.graph.input.add(name=tensor.name).type.tensor_type
            weight.elem_type = tensor.data_type
            for size in tensor.dims:
                weight.shape.dim.add(dim_value=size)
    del model, light.graph.value_info[:]
    try:
        graph = onnx.shape_inference.infer_shapes(light, data_prop=True).graph
    except (ValueError, RuntimeError, MemoryError):
        return  # the runtime says what is wrong with it
    most = psutil.virtual_memory().total
    for value in (*graph.value_info, *graph.output):
        kind = value.type.tensor_type
        count = math.prod(dim.dim_value or 1 for dim in kind.shape.dim)
        # A byte each is the least that any type takes.
        if count > most:
            raise InputError(
                f"{path} asks for a tensor {short(value.name)} of {count:.1e} numbers, and this "
                f"machine has {most:.1e} bytes of memory; rebuild the artifact"
            )


@contextlib.contextmanager
def beside(model: onnx.ModelProto, path: Path | None) -> Iterator[onnx.ModelProto | Path]:
    """A graph on the weights of the model in ``path``, in a file next to it while it is needed.

    Without a path it is the graph itself.
    """
    if path is None:
        yield model
        return
    other = path.with_name(f"{path.name}.twin")
    try:
        other.write_bytes(model.SerializeToString())
        yield other
    finally:
        other.unlink(missing_ok=True)


@contextlib.contextmanager
def serialized(model: onnx.ModelProto) -> Iterator[bytes | str]:
    """The model in a form that ONNX Runtime loads: bytes, or a temporary file if it is large."""
    if weight_bytes(model) <= min(LARGE_BYTES, EXTERNAL_DATA_BYTES):
        yield model.SerializeToString()
        return
    with tempfile.TemporaryDirectory(prefix="tome-export-") as folder:
        yield str(save(model, Path(folder) / "model.onnx")[0])


def extra_inputs_of(model: onnx.ModelProto) -> dict[str, tuple[int, ...]]:
    """A graph's inputs besides the images: shape of each without the batch."""
    return {
        value.name: tuple(dim.dim_value for dim in value.type.tensor_type.shape.dim[1:])
        for value in model.graph.input
        if value.name != INPUT_NAME
    }


def patch_embedding(path: Path) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Weights ``[D, C, h, w]``, bias ``[D]`` of the convolution that cuts pixels into patches."""
    graph = load(path).graph
    pixels, found = {INPUT_NAME}, None
    raw = graph.input[0].type.tensor_type.elem_type == onnx.TensorProto.UINT8
    # What patch.pixels does to uint8, in this order; the weights are for what comes of it.
    ahead = ["Div", "Sub", "Div"] if raw else []
    for node in graph.node:
        if node.input and node.input[0] in pixels:
            if ahead and node.op_type == ahead[0]:
                ahead.pop(0)
                pixels = {node.output[0]}
            elif node.op_type == "Cast" or (ahead and node.op_type == "Transpose"):
                pixels.add(node.output[0])
        if node.op_type == "Conv" and node.input[0] in pixels and not ahead:
            found = node
            break
    if found is None or not _is_side_by_side(found):
        raise InputError(
            f"{path} does not begin with a convolution that cuts patches, which a learned policy "
            "looks at; choose another policy"
        )
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    weights, *bias = (
        np.asarray(numpy_helper.to_array(tensors[name]), np.float64) for name in found.input[1:]
    )
    return weights, bias[0] if bias else np.zeros(len(weights))


def _is_side_by_side(node: NodeProto) -> bool:
    values: dict[str, Any] = {a.name: list(a.ints) or a.i for a in node.attribute}
    plain = values.get("strides") == values.get("kernel_shape") and values.get("group", 1) == 1
    return bool(plain and not any(values.get("pads") or ()))
