"""Graphs for TensorRT plugins: match nodes read the keys where they lie, and what kernels see.

The exporter gives a match node the keys ``[B, H, N, D]``, which are a transposed part of the QKV
product ``[B, N, W]``. A runtime that fuses attention has no use for the transposed keys and would
write them for the plugin alone. So the node takes the product itself, and attributes say which of
its columns are the keys (``merge.spec``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import onnx

from tome_export.errors import InputError
from tome_export.merge import spec
from tome_export.onnx.functions import class_token_of, keys_attributes, match_function


class MatchShape(NamedTuple):
    """What one layer hands to TomeMatch: the arguments of ``plugins.match.contract.variant``."""

    tokens: int
    width: int
    dtype: str
    strides: tuple[int, int, int]
    offset: int


class MergeShape(NamedTuple):
    """What one layer hands to TomeMerge: the arguments of ``plugins.merge.contract.variant``."""

    width: int
    dtype: str


@dataclass(frozen=True)
class Merging:
    """The match and merge nodes of a graph in order; a reducer may have none of either."""

    matches: tuple[MatchShape, ...]
    merges: tuple[MergeShape, ...]


def merging_of(model: onnx.ModelProto) -> Merging:
    """The merging nodes of a model exported by this package."""
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


_BATCH = 2
"""Stands for a batch that is not fixed. Not 1, so that the stride between images shows."""


def read_keys_from_products(model: onnx.ModelProto, opset: int) -> None:
    """Let the match nodes of a model take products, if all of them can.

    Requires a plugin graph with its functions attached, the nodes in the order in which the model
    runs, and a shape for every tensor between a product and a match.

    Ensures every match node carries ``spec.KEYS_ATTRIBUTES``. Where the keys of all match nodes are
    views of a 3D tensor (a ready metric is one of itself), each takes the one furthest up, the body
    of ``TomeMatch`` reads products, and what nothing reads any longer is gone. Otherwise (q/k norms
    and rotary embeddings make keys that lie nowhere in a product) all take the keys as they are:
    functions are known by name alone, so a graph has one body. The model is changed in place.
    """
    graph = model.graph
    matches = [node for node in graph.node if node.op_type == spec.MATCH]
    if not matches:
        return
    shapes = {
        value.name: tuple(dim.dim_value for dim in value.type.tensor_type.shape.dim)
        for value in (*graph.value_info, *graph.input)
    }
    makers = {name: node for node in graph.node for name in node.output}
    found = [_product_of(node.input[0], makers, shapes) for node in matches]
    fits = [product for product in found if product is not None]
    whole = len(fits) == len(matches)
    as_they_are = dict(spec.KEYS_ATTRIBUTES)
    for index, node in enumerate(matches):
        source, where = fits[index] if whole else (node.input[0], as_they_are)
        node.input[0] = source
        node.attribute.extend(onnx.helper.make_attribute(*item) for item in where.items())
    if whole:
        function = next(f for f in model.functions if f.name == spec.MATCH)
        class_token = class_token_of(matches)
        function.CopyFrom(match_function(opset, class_token=class_token, plugin=True, product=True))
        _drop_unread(graph)


def _product_of(
    keys: str, makers: dict[str, onnx.NodeProto], shapes: dict[str, tuple[int, ...]]
) -> tuple[str, dict[str, int]] | None:
    """The product that the keys are a view of, and the attributes that say where; None without.

    The nodes between are carried out on an array that nobody fills: NumPy gives them back as views
    with strides, wherever views will do.
    """
    product = None
    path: list[tuple[onnx.NodeProto, str]] = []
    name = keys
    while name in shapes:
        if len(shapes[name]) == 3:
            product = _as_product(name, path, shapes) or product
        node = makers.get(name)
        if node is None or node.op_type not in _VIEWS:
            break
        path.insert(0, (node, name))
        name = node.input[0]
    return product


def _as_product(
    source: str, path: list[tuple[onnx.NodeProto, str]], shapes: dict[str, tuple[int, ...]]
) -> tuple[str, dict[str, int]] | None:
    """The keys at the end of a path of nodes as columns of the tensor at its beginning."""
    batch, tokens, columns = shapes[source]
    whole = np.empty((batch or _BATCH, tokens, columns), np.int8)
    view = whole
    try:
        for node, output in path:
            view = _VIEWS[node.op_type](view, node, output, shapes)
        keys = view[:, None] if view.ndim == 3 else view
        heads, width = keys.shape[1], keys.shape[3]
        offset = _address(keys) - _address(whole)
        wanted = spec.keys_view((tokens, columns), heads, width, offset)
    except ValueError:  # a shape of several unknown lengths, or keys outside the product
        return None
    same = keys.shape == (len(whole), heads, tokens, width) and all(
        # The stride of a dimension of one element says nothing.
        length == 1 or stride == expected
        for length, stride, expected in zip(
            keys.shape, keys.strides, (*wanted.strides, 1), strict=True
        )
    )
    # A copy may lie at any address.
    if not same or not np.may_share_memory(keys, whole):
        return None
    return source, {"heads": heads, "width": width, "offset": offset}


def _address(array: Any) -> int:
    address: int = array.__array_interface__["data"][0]
    return address


def _reshape(view: Any, _: onnx.NodeProto, output: str, shapes: dict[str, tuple[int, ...]]) -> Any:
    """By the shape that is known of the result; one length may be a batch's."""
    return view.reshape([length or -1 for length in shapes[output]])


def _transpose(view: Any, node: onnx.NodeProto, _: str, __: dict[str, tuple[int, ...]]) -> Any:
    return view.transpose(_attribute(node, "perm"))


def _split(view: Any, node: onnx.NodeProto, output: str, shapes: dict[str, tuple[int, ...]]) -> Any:
    """The part of that name; the lengths of the parts are in their shapes."""
    axis = _attribute(node, "axis") or 0
    begin = sum(shapes[name][axis] for name in node.output[: list(node.output).index(output)])
    return np.moveaxis(np.moveaxis(view, axis, 0)[begin : begin + shapes[output][axis]], 0, axis)


_VIEWS = {"Reshape": _reshape, "Transpose": _transpose, "Split": _split}
"""Operators that exporters put between a product and its keys, and how NumPy carries them out."""


def _attribute(node: onnx.NodeProto, name: str) -> Any:
    return next(
        (onnx.helper.get_attribute_value(a) for a in node.attribute if a.name == name), None
    )


def _drop_unread(graph: onnx.GraphProto) -> None:
    """Remove nodes, weights and descriptions of what nothing reads."""
    read = {value.name for value in graph.output}
    kept = []
    for node in reversed(graph.node):
        if read.intersection(node.output):
            kept.append(node)
            read.update(node.input)
    del graph.node[:]
    graph.node.extend(reversed(kept))
    made = read.union(*(node.output for node in kept))
    for part in (graph.initializer, graph.value_info):
        names = [item.name for item in part]
        for index in reversed(range(len(names))):
            if names[index] not in made:
                del part[index]
