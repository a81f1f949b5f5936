"""The merging layers of an exported graph as the plugin's kernels see them."""

from __future__ import annotations

from dataclasses import dataclass

import onnx

from tome_export.errors import InputError
from tome_export.merge import spec

_DTYPES = {
    onnx.TensorProto.FLOAT: "float32",
    onnx.TensorProto.FLOAT16: "float16",
    onnx.TensorProto.BFLOAT16: "bfloat16",
}


@dataclass(frozen=True)
class MergingLayer:
    """What one layer hands to TomeMatch and TomeMerge.

    Attributes:
        tokens: N.
        head_width: D.
        keys_dtype: Of the keys.
        width: C.
        dtype: Of the tokens.
    """

    tokens: int
    head_width: int
    keys_dtype: str
    width: int
    dtype: str


def merging_layers(model: onnx.ModelProto) -> list[MergingLayer]:
    """The merging layers of a model exported by this package, in order.

    Raises:
        InputError: if a shape is missing.
    """
    values = {v.name: v for v in (*model.graph.value_info, *model.graph.input)}

    def described(name: str) -> tuple[str, list[int]]:
        if name not in values:
            raise InputError(f"the model has no shape for {name!r}; rebuild the artifact")
        tensor = values[name].type.tensor_type
        dtype = _DTYPES.get(tensor.elem_type, onnx.TensorProto.DataType.Name(tensor.elem_type))
        return dtype, [dim.dim_value for dim in tensor.shape.dim]

    matches = [node for node in model.graph.node if node.op_type == spec.MATCH]
    merges = [node for node in model.graph.node if node.op_type == spec.MERGE]
    layers = []
    for match, merge in zip(matches, merges, strict=True):
        keys_dtype, keys = described(match.input[0])
        dtype, x = described(merge.input[0])
        layers.append(MergingLayer(keys[-2], keys[-1], keys_dtype, x[-1], dtype))
    return layers
