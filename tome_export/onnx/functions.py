"""The ONNX functions ``TomeMatch`` and ``TomeMerge``: one shape-generic body each.

A runtime with a plugin of that name takes the plugin; every other one inlines the body. Parsers
look functions up by name alone, so all layers share one body: the number of tokens is read from
the shapes and r from the node's attribute. The bodies contain no empty tensors, whatever the
prefix and however r is clamped, because TensorRT handles those badly.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Literal

import onnx

from tome_export.merge import spec

Lowering = Literal["index_add", "matmul"]

_MATCH = """
<opset_import: ["" : OPSET], domain: "DOMAIN">
TomeMatch <r, prefix, class_token> (keys) => (keep, src, dst) {
    zero = Constant <value_int: int = 0> ()
    one = Constant <value_int: int = 1> ()
    two = Constant <value_int: int = 2> ()
    axis1 = Constant <value_ints: ints = [1]> ()
    last = Constant <value_ints: ints = [-1]> ()
    begin = Constant <value_ints: ints = [0]> ()
    odd = Constant <value_ints: ints = [1]> ()
    stride = Constant <value_ints: ints = [2]> ()
    end = Constant <value_ints: ints = [9223372036854775807]> ()
    r_ = Constant <value_int: int = @r> ()
    p = Constant <value_int: int = @prefix> ()
    ct = Constant <value_int: int = @class_token> ()
    by_position = Cast <to: int = 9> (ct)

METRIC
    n_ = Shape <start: int = 1, end: int = 2> (metric)
    n = Squeeze (n_)
    n_plus = Add (n, one)
    na = Div (n_plus, two)
    nb = Div (n, two)
    p_plus = Add (p, one)
    pa = Div (p_plus, two)
    pb = Div (p, two)
    rows = Range (zero, na, one)
    columns = Range (zero, nb, one)

    norm = ReduceL2 <keepdims: int = 1> (metric, last)
    eps = Constant <value_float: float = NORM_EPS> ()
    norm_floor = Max (norm, eps)
    scaled = Div (metric, norm_floor)
    limit = Constant <value_float: float = NORM_LIMIT> ()
    nothing = Constant <value_float: float = 0.0> ()
    finite = Less (norm, limit)
    unit = Where (finite, scaled, nothing)
    a = Slice (unit, begin, end, axis1, stride)
    b = Slice (unit, odd, end, axis1, stride)
    b_t = Transpose <perm: ints = [0, 2, 1]> (b)
    scores = MatMul (a, b_t)
    lowest = Constant <value_float: float = -1e30> ()
    zero_f = Constant <value_float: float = 0.0> ()
    column_protected = Less (columns, pb)
    column_mask = Where (column_protected, lowest, zero_f)
    allowed = Add (scores, column_mask)
    best = ArgMax <axis: int = 2, keepdims: int = 0, select_last_index: int = 0> (allowed)
    value_all = ReduceMax <keepdims: int = 0> (allowed, last)
    row_protected = Less (rows, pa)
    value = Where (row_protected, lowest, value_all)
    na_ = Unsqueeze (na, begin)
    values, rank = TopK <axis: int = 1, largest: int = 1, sorted: int = 1> (value, na_)

    big = Constant <value_float: float = 1048576.0> ()
    minus_big = Neg (big)
    minus_two_big = Add (minus_big, minus_big)
    rank_f = Cast <to: int = 1> (rank)
    place_f = Cast <to: int = 1> (rows)
    stay_key = Where (by_position, rank_f, place_f)
    protected_key = Add (rank_f, minus_big)
    merged_key = Add (place_f, minus_two_big)
    protected = Less (rank, pa)
    rest_key = Where (protected, protected_key, stay_key)
    is_merged = Less (rows, r_)
    key = Where (is_merged, merged_key, rest_key)
    sorted_key, permutation = TopK <axis: int = 1, largest: int = 0, sorted: int = 1> (key, na_)
    order = GatherElements <axis: int = 1> (rank, permutation)

    r_1 = Unsqueeze (r_, begin)
    merged = Slice (order, begin, r_1, axis1)
    src64 = Mul (merged, two)
    src = Cast <to: int = 6> (src64)
    to_output = Sub (n, r_)
    offset = Sub (to_output, nb)
    dst_b = GatherElements <axis: int = 1> (best, merged)
    dst64 = Add (dst_b, offset)
    dst = Cast <to: int = 6> (dst64)

    tokens_a = Mul (order, two)
    odd_columns = Mul (columns, two)
    tokens_b = Add (odd_columns, one)
    batch = Shape <start: int = 0, end: int = 1> (keys)
    nb_ = Unsqueeze (nb, begin)
    shape_b = Concat <axis: int = 0> (batch, nb_)
    tokens_b_all = Expand (tokens_b, shape_b)
    tokens = Concat <axis: int = 1> (tokens_a, tokens_b_all)
    outputs = Range (zero, to_output, one)
    half = Div (outputs, two)
    twice = Mul (half, two)
    is_even = Equal (outputs, twice)
    even_slot = Add (half, r_)
    odd_slot = Add (half, na)
    prefix_slot = Where (is_even, even_slot, odd_slot)
    b_slot = Add (outputs, r_)
    a_slot = Sub (b_slot, pb)
    a_left = Sub (na, pa)
    a_stay = Sub (a_left, r_)
    a_end = Add (a_stay, p)
    is_a = Less (outputs, a_end)
    body_slot = Where (is_a, a_slot, b_slot)
    is_prefix = Less (outputs, p)
    slot = Where (is_prefix, prefix_slot, body_slot)
    keep64 = Gather <axis: int = 1> (tokens, slot)
    keep = Cast <to: int = 6> (keep64)
}
"""

# Keys [B, H, N, D], or a ready metric [B, N, D], to the metric [B, N, D] in fp32.
_METRIC_FROM_KEYS = """
    batch_heads = Constant <value_ints: ints = [0, -1]> ()
    tokens_width = Shape <start: int = -2> (keys)
    by_head = Concat <axis: int = 0> (batch_heads, tokens_width)
    keys_4d = Reshape (keys, by_head)
    keys_f = Cast <to: int = 1> (keys_4d)
    metric = ReduceMean <keepdims: int = 0> (keys_f, axis1)
"""

_MERGE_HEAD = """
<opset_import: ["" : OPSET], domain: "DOMAIN">
TomeMerge (x, size, keep, src, dst) => (x_out, size_out) {
    axis1 = Constant <value_ints: ints = [1]> ()
    last = Constant <value_ints: ints = [-1]> ()
    keep64 = Cast <to: int = 7> (keep)
    src64 = Cast <to: int = 7> (src)
    keep_nd = Unsqueeze (keep64, last)
    src_nd = Unsqueeze (src64, last)
    x_keep_t = GatherND <batch_dims: int = 1> (x, keep_nd)
    x_src_t = GatherND <batch_dims: int = 1> (x, src_nd)
    x_keep = Cast <to: int = 1> (x_keep_t)
    x_src = Cast <to: int = 1> (x_src_t)
    size_keep = GatherND <batch_dims: int = 1> (size, keep_nd)
    size_src = GatherND <batch_dims: int = 1> (size, src_nd)
    size_keep_c = Unsqueeze (size_keep, last)
    own = Mul (x_keep, size_keep_c)
"""

_MERGE_INDEX_ADD = """
    zero = Constant <value_int: int = 0> ()
    one = Constant <value_int: int = 1> ()
    middle_last = Constant <value_ints: ints = [1, 2]> ()
    batch_ = Shape <start: int = 0, end: int = 1> (dst)
    batch = Squeeze (batch_)
    images = Range (zero, batch, one)
    images_nd = Unsqueeze (images, middle_last)
    dst_all64 = Cast <to: int = 7> (dst)
    dropped = Less (dst_all64, zero)
    dst64 = Max (dst_all64, zero)
    dst_nd = Unsqueeze (dst64, last)
    index_shape = Shape (dst_nd)
    images_all = Expand (images_nd, index_shape)
    index = Concat <axis: int = 2> (images_all, dst_nd)
    zero_f = Constant <value_float: float = 0.0> ()
    size_moved = Where (dropped, zero_f, size_src)
    size_moved_c = Unsqueeze (size_moved, last)
    moved = Mul (x_src, size_moved_c)
    total = ScatterND <reduction: string = "add"> (own, index, moved)
    size_out = ScatterND <reduction: string = "add"> (size_keep, index, size_moved)
"""

# The matrix holds sizes, not ones: sizes and x survive reduced-precision products unrounded.
_MERGE_MATMUL = """
    zero = Constant <value_int: int = 0> ()
    one = Constant <value_int: int = 1> ()
    zero_f = Constant <value_float: float = 0.0> ()
    kept_ = Shape <start: int = 1, end: int = 2> (keep)
    kept = Squeeze (kept_)
    places64 = Range (zero, kept, one)
    places = Cast <to: int = 6> (places64)
    places_c = Unsqueeze (places, last)
    dst_r = Unsqueeze (dst, axis1)
    hit = Equal (places_c, dst_r)
    size_src_r = Unsqueeze (size_src, axis1)
    weights = Where (hit, size_src_r, zero_f)
    received = ReduceSum <keepdims: int = 0> (weights, last)
    size_out = Add (size_keep, received)
    moved = MatMul (weights, x_src)
    total = Add (own, moved)
"""

_MERGE_TAIL = """
    size_out_c = Unsqueeze (size_out, last)
    mean = Div (total, size_out_c)
    x_out = CastLike (mean, x)
}
"""

_PLAN = """
<opset_import: ["" : OPSET], domain: "DOMAIN">
TomePlan <layer> (keep, src, dst) => (keep_out, src_out, dst_out) {
    keep_out = Identity (keep)
    src_out = Identity (src)
    dst_out = Identity (dst)
}
"""

_SIGNAL = """
<opset_import: ["" : OPSET], domain: "DOMAIN">
TomeSignal <layer, index> (x) => (x_out) {
    x_out = Identity (x)
}
"""

_BODIES: dict[Lowering, str] = {"index_add": _MERGE_INDEX_ADD, "matmul": _MERGE_MATMUL}


def _parse(text: str, opset: int, plugin: bool) -> onnx.FunctionProto:
    filled = text.replace("OPSET", str(opset)).replace("DOMAIN", spec.DOMAIN)
    for name in ("NORM_EPS", "NORM_LIMIT"):
        filled = filled.replace(name, repr(getattr(spec, name)))
    function = onnx.parser.parse_function(filled)
    if plugin:
        # With defaults, because only so can a function's attribute be declared with its type.
        function.attribute_proto.extend(
            onnx.helper.make_attribute(name, value) for name, value in spec.PLUGIN_ATTRIBUTES
        )
    return function


def match_function(opset: int, *, plugin: bool = False) -> onnx.FunctionProto:
    """``TomeMatch`` in standard operators.

    Args:
        opset: Of the standard operators.
        plugin: Declare the attributes of nodes meant for TensorRT plugins.
    """
    return _parse(_MATCH.replace("METRIC", _METRIC_FROM_KEYS), opset, plugin)


def merge_function(lowering: Lowering, opset: int, *, plugin: bool = False) -> onnx.FunctionProto:
    """``TomeMerge`` in standard operators: by scatter-add or by a matrix product.

    Args:
        lowering: Which of the two.
        opset: Of the standard operators.
        plugin: Declare the attributes of nodes meant for TensorRT plugins.
    """
    return _parse(_MERGE_HEAD + _BODIES[lowering] + _MERGE_TAIL, opset, plugin)


def functions_for(
    used: Collection[str], lowering: Lowering, opset: int, *, plugin: bool = False
) -> list[onnx.FunctionProto]:
    """The functions that a graph needs.

    Args:
        used: Operators of this package's domain in the graph.
        lowering: Body of ``TomeMerge``.
        opset: Of the standard operators.
        plugin: Declare the attributes of nodes meant for TensorRT plugins.
    """
    makers: dict[str, Callable[[], onnx.FunctionProto]] = {
        spec.MATCH: lambda: match_function(opset, plugin=plugin),
        spec.MERGE: lambda: merge_function(lowering, opset, plugin=plugin),
        spec.PLAN: lambda: _parse(_PLAN, opset, plugin=False),
        spec.SIGNAL: lambda: _parse(_SIGNAL, opset, plugin=False),
    }
    return [make() for name, make in makers.items() if name in used]
