"""The merging layers of an exported graph as the plugin's kernels see them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import onnx

from tome_export.errors import InputError
from tome_export.merge import spec
from tome_export.onnx.functions import keys_attributes


class MatchShape(NamedTuple):
    """What one layer hands to TomeMatch.

    Attributes:
        tokens: N.
        width: D of a head, or of a metric.
        dtype: Of the keys.
        strides: From image to image, head to head and token to token, in elements.
        offset: Elements before the first key.
    """

    tokens: int
    width: int
    dtype: str
    strides: tuple[int, int, int]
    offset: int


class MergeShape(NamedTuple):
    """What one layer hands to TomeMerge.

    Attributes:
        width: C.
        dtype: Of the tokens.
    """

    width: int
    dtype: str


@dataclass(frozen=True)
class Merging:
    """The match and merge nodes of a graph in order; a reducer may have none of either."""

    matches: tuple[MatchShape, ...]
    merges: tuple[MergeShape, ...]


def merging_of(model: onnx.ModelProto) -> Merging:
    """The merging nodes of a model exported by this package.

    Raises:
        InputError: if a shape is missing, or a product lacks the columns of its keys.
    """
    values = {v.name: v for v in (*model.graph.value_info, *model.graph.input)}

    def described(name: str) -> tuple[str, list[int]]:
        if name not in values:
            raise InputError(f"the model has no shape for {name!r}; rebuild the artifact")
        tensor = values[name].type.tensor_type
        dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type).name
        return dtype, [dim.dim_value for dim in tensor.shape.dim]

    matches, merges = [], []
    for node in model.graph.node:
        if node.op_type == spec.MATCH:
            dtype, keys = described(node.input[0])
            try:
                view = spec.keys_view(keys[1:], **keys_attributes(node))
            except ValueError as error:
                raise InputError(f"{node.name}: {error}; rebuild the artifact") from error
            matches.append(MatchShape(view.tokens, view.width, dtype, view.strides, view.offset))
        elif node.op_type == spec.MERGE:
            dtype, x = described(node.input[0])
            merges.append(MergeShape(x[-1], dtype))
    return Merging(tuple(matches), tuple(merges))
