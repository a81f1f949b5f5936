"""The ONNX functions ``TomeMatch`` and ``TomeMerge``: one shape-generic body each.

Only a graph for the TensorRT plugin has them as functions, which TensorRT takes the plugin for and
other runtimes inline; importers that know no functions, such as OpenVINO's, are given graphs in
which ``inline`` has put the bodies in the place of their calls. Parsers look functions up by name
alone, so all layers share one body: the number of tokens is read from the shapes and r from the
node's attribute. The bodies contain no empty tensors, whatever the prefix and however r is clamped,
because TensorRT handles those badly.

``TomeMatch`` has a body for either order of the tokens that stay, because only one of them needs
all of set A sorted, and TensorRT's TopK gives at most 3,840 numbers (``engine.limits``).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping

import onnx

from tome_export.errors import ExportError
from tome_export.merge import spec
from tome_export.spec import Lowering

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
    r_1 = Unsqueeze (r_, begin)
    left = Sub (na, r_)

ORDER
    two_32 = Cast <to: int = 6> (two)
    src = Mul (merged_32, two_32)
    to_output = Sub (n, r_)
    offset = Sub (to_output, nb)
    dst_b = GatherElements <axis: int = 1> (best, merged)
    dst64 = Add (dst_b, offset)
    dst = Cast <to: int = 6> (dst64)

    tokens_a = Mul (ordered, two_32)
    odd_columns = Mul (columns, two)
    tokens_b64 = Add (odd_columns, one)
    tokens_b = Cast <to: int = 6> (tokens_b64)
    batch = Shape <start: int = 0, end: int = 1> (keys)
    nb_ = Unsqueeze (nb, begin)
    shape_b = Concat <axis: int = 0> (batch, nb_)
    tokens_b_all = Expand (tokens_b, shape_b)
    tokens = Concat <axis: int = 1> (tokens_a, tokens_b_all)
    outputs = Range (zero, to_output, one)
    a_slot = Add (outputs, a_shift)
    b_slot = Add (outputs, b_shift)
    a_end = Add (left, pb)
    is_a = Less (outputs, a_end)
    wanted = Where (is_a, a_slot, b_slot)
    slot = Max (wanted, zero)
    behind = Gather <axis: int = 1> (tokens, slot)
    is_prefix = Less (outputs, p)
    prefix_tokens = Cast <to: int = 6> (outputs)
    keep = Where (is_prefix, prefix_tokens, behind)
}
"""

# The rows of A that stay, in order of position, which sorts r values and counts for the rest. The
# merged row m_i has c_i merged ones before it, so it is passed by every row that stays from the
# (m_i - c_i)-th on: the j-th of them is row j + #{i: m_i - c_i <= j}. The protected rows are first
# by themselves. One place more than rows stay, for A may leave none. Counts are exact in fp32.
# (A scatter and a running sum save a CPU up to a tenth of a match, benchmarks/long_sequences.py; on
# a GPU they should be more kernels, as comparisons and their sums can fuse. Not measured there.)
_BY_POSITION = """
    values, merged = TopK <axis: int = 1, largest: int = 1, sorted: int = 1> (value, r_1)
    merged_32 = Cast <to: int = 6> (merged)
    merged_c = Unsqueeze (merged_32, last)
    merged_r = Unsqueeze (merged_32, axis1)
    is_earlier = Less (merged_r, merged_c)
    earlier_f = Cast <to: int = 1> (is_earlier)
    earlier_sum = ReduceSum <keepdims: int = 0> (earlier_f, last)
    earlier = Cast <to: int = 6> (earlier_sum)
    passed_from = Sub (merged_32, earlier)
    passed_from_r = Unsqueeze (passed_from, axis1)
    stays_end = Add (left, one)
    stays64 = Range (zero, stays_end, one)
    stays = Cast <to: int = 6> (stays64)
    stays_c = Unsqueeze (stays, last)
    is_passed = LessOrEqual (passed_from_r, stays_c)
    passed_f = Cast <to: int = 1> (is_passed)
    passed_sum = ReduceSum <keepdims: int = 0> (passed_f, last)
    passed = Cast <to: int = 6> (passed_sum)
    ordered = Add (stays, passed)
    a_shift = Neg (pb)
    b_shift = Identity (one)
"""

# In order of rank: all of A is sorted, and the protected rows come last.
_BY_RANK = """
    na_ = Unsqueeze (na, begin)
    values, rank = TopK <axis: int = 1, largest: int = 1, sorted: int = 1> (value, na_)
    merged = Slice (rank, begin, r_1, axis1)
    merged_32 = Cast <to: int = 6> (merged)
    ordered = Cast <to: int = 6> (rank)
    a_shift = Sub (r_, p)
    b_shift = Identity (r_)
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

# Of a product [B, N, W], whose columns from ``offset`` on are the keys, head after head.
_METRIC_FROM_PRODUCT = """
    axis2 = Constant <value_ints: ints = [2]> ()
    heads = Constant <value_int: int = @heads> ()
    width = Constant <value_int: int = @width> ()
    first_key = Constant <value_int: int = @offset> ()
    keys_length = Mul (heads, width)
    after_keys = Add (first_key, keys_length)
    keys_begin = Unsqueeze (first_key, begin)
    keys_end = Unsqueeze (after_keys, begin)
    keys_3d = Slice (keys, keys_begin, keys_end, axis2)
    batch_tokens = Constant <value_ints: ints = [0, 0]> ()
    heads_ = Unsqueeze (heads, begin)
    width_ = Unsqueeze (width, begin)
    by_head = Concat <axis: int = 0> (batch_tokens, heads_, width_)
    keys_4d = Reshape (keys_3d, by_head)
    keys_f = Cast <to: int = 1> (keys_4d)
    metric = ReduceMean <keepdims: int = 0> (keys_f, axis2)
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
"""Name of a lowering -> the middle of the body of ``TomeMerge``."""


def _parse(
    text: str, opset: int, attributes: Iterable[tuple[str, str | int]] = ()
) -> onnx.FunctionProto:
    """A function from its text; attributes with defaults are declared besides."""
    filled = text.replace("OPSET", str(opset)).replace("DOMAIN", spec.DOMAIN)
    for name in ("NORM_EPS", "NORM_LIMIT"):
        filled = filled.replace(name, repr(getattr(spec, name)))
    function = onnx.parser.parse_function(filled)
    # With defaults, because only so can a function's attribute be declared with its type.
    function.attribute_proto.extend(
        onnx.helper.make_attribute(name, value) for name, value in attributes
    )
    return function


def match_function(
    opset: int, *, class_token: bool, plugin: bool = False, product: bool = False
) -> onnx.FunctionProto:
    """``TomeMatch`` in standard operators, for nodes that share the attribute ``class_token``.

    With ``plugin`` the attributes of nodes meant for TensorRT plugins are declared; with
    ``product``, which needs them, the keys are read from a product.
    """
    metric = _METRIC_FROM_PRODUCT if product else _METRIC_FROM_KEYS
    attributes = (*spec.KEYS_ATTRIBUTES, *spec.PLUGIN_ATTRIBUTES) if plugin else ()
    order = _BY_POSITION if class_token else _BY_RANK
    return _parse(_MATCH.replace("METRIC", metric).replace("ORDER", order), opset, attributes)


def merge_function(lowering: Lowering, opset: int, *, plugin: bool = False) -> onnx.FunctionProto:
    """``TomeMerge`` in standard operators: by scatter-add or by a matrix product."""
    body = _MERGE_HEAD + _BODIES[lowering] + _MERGE_TAIL
    return _parse(body, opset, spec.PLUGIN_ATTRIBUTES if plugin else ())


def class_token_of(nodes: Iterable[onnx.NodeProto]) -> bool:
    """The attribute ``class_token`` that the match nodes of a graph share; true without any."""
    found = {
        bool(attribute.i)
        for node in nodes
        for attribute in node.attribute
        if node.op_type == spec.MATCH and attribute.name == "class_token"
    }
    if len(found) > 1:
        raise ExportError(
            "the graph has TomeMatch nodes with class_token 0 and 1; expected one for all, which "
            "share a function: export the parts as models of their own"
        )
    return False not in found


def functions_for(
    nodes: Collection[onnx.NodeProto], lowering: Lowering, opset: int, *, plugin: bool = False
) -> list[onnx.FunctionProto]:
    """The functions that a graph's nodes need."""
    used = {node.op_type for node in nodes if node.domain == spec.DOMAIN}
    class_token = class_token_of(nodes)
    makers: dict[str, Callable[[], onnx.FunctionProto]] = {
        spec.MATCH: lambda: match_function(opset, class_token=class_token, plugin=plugin),
        spec.MERGE: lambda: merge_function(lowering, opset, plugin=plugin),
        spec.PLAN: lambda: _parse(_PLAN, opset),
        spec.SIGNAL: lambda: _parse(_SIGNAL, opset),
    }
    return [make() for name, make in makers.items() if name in used]


def inline(model: onnx.ModelProto, operators: Collection[str] = tuple(spec.SUFFIXES)) -> None:
    """Put bodies in the place of their calls, in place; names are those of ``onnx.names``.

    The model has its functions, and shapes of what goes into calls and comes out of them; functions
    of other ``operators`` stay.
    """
    graph = model.graph
    bodies = {f.name: f for f in model.functions if f.name in operators}
    types = {v.name: v.type.tensor_type for v in (*graph.input, *graph.value_info, *graph.output)}
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        if node.domain != spec.DOMAIN or node.op_type not in bodies:
            nodes.append(node)
            continue
        nodes += expanded(node, bodies[node.op_type], types)
        if node.op_type == spec.MATCH:
            graph.value_info.append(metric_of(node, types[node.input[0]]))
    del graph.node[:]
    graph.node.extend(nodes)
    for index in reversed(range(len(model.functions))):
        if model.functions[index].name in bodies:
            del model.functions[index]
    if not model.functions:
        standard = [opset for opset in model.opset_import if opset.domain != spec.DOMAIN]
        del model.opset_import[:]
        model.opset_import.extend(standard)


def _metric_name(match: onnx.NodeProto) -> str:
    return f"{match.name.rpartition('.')[0]}.metric"


def metric_of(match: onnx.NodeProto, keys: onnx.TypeProto.Tensor) -> onnx.ValueInfoProto:
    """The tensor ``[B, N, D]`` in a match's body that it decides by, given its input's type."""
    batch, *lengths = keys.shape.dim
    view = spec.keys_view([n.dim_value for n in lengths], **keys_attributes(match))
    shape = [batch.dim_param or batch.dim_value, view.tokens, view.width]
    return onnx.helper.make_tensor_value_info(_metric_name(match), onnx.TensorProto.FLOAT, shape)


def keys_attributes(match: onnx.NodeProto) -> dict[str, int]:
    """Where in its input a match node finds the keys: ``heads``, ``width`` and ``offset``."""
    found = dict(spec.KEYS_ATTRIBUTES)
    return found | {a.name: a.i for a in match.attribute if a.name in found}


def expanded(
    call: onnx.NodeProto, body: onnx.FunctionProto, types: Mapping[str, onnx.TypeProto.Tensor]
) -> Iterator[onnx.NodeProto]:
    """The nodes of a call's body, with the names that ``onnx.names`` gives them.

    ``types`` are those of the call's outputs, for bodies that take their dtype from an input.
    """
    names = dict(zip((*body.input, *body.output), (*call.input, *call.output), strict=True))
    if call.op_type == spec.MATCH:
        names["metric"] = _metric_name(call)
    attributes = {a.name: a for a in (*body.attribute_proto, *call.attribute)}
    for part in body.node:
        node = onnx.NodeProto()
        node.CopyFrom(part)
        node.name = f"{call.name}/{part.output[0]}"
        node.input[:] = [names.get(name, f"{call.name}/{name}") for name in part.input]
        node.output[:] = [names.get(name, f"{call.name}/{name}") for name in part.output]
        for attribute in node.attribute:
            if attribute.ref_attr_name:
                name = attribute.name
                attribute.CopyFrom(attributes[attribute.ref_attr_name])
                attribute.name = name
        if node.op_type == "CastLike" and node.output[0] in types:
            node.op_type = "Cast"
            del node.input[1:]
            dtype = types[node.output[0]].elem_type
            node.attribute.append(onnx.helper.make_attribute("to", dtype))
        yield node
