"""The patch embedding of an exported model: its first convolution."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import NodeProto, numpy_helper

from tome_export.errors import InputError
from tome_export.onnx.files import load
from tome_export.spec import INPUT_NAME


def patch_embedding(path: Path) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Weights ``[D, C, h, w]``, bias ``[D]`` of the convolution that cuts pixels into patches."""
    graph = load(path).graph
    pixels, found = {INPUT_NAME}, None
    for node in graph.node:
        if node.op_type == "Cast" and node.input[0] in pixels:
            pixels.add(node.output[0])
        if node.op_type == "Conv" and node.input[0] in pixels:
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
