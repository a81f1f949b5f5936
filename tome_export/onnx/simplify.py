"""Graph simplification by onnxsim, with what it must not break checked afterwards."""

from __future__ import annotations

from collections import Counter

import onnx

from tome_export.errors import ExportError
from tome_export.merge import spec


def simplified(model: onnx.ModelProto) -> onnx.ModelProto:
    """Fold constants and drop dead nodes.

    Requires functions already attached and a model under protobuf's 2 GB.
    Ensures the same inputs and outputs, and every match and merge node still in place.

    Raises:
        ExportError: if onnxsim cannot validate its own result.
    """
    import onnxsim

    before = _signature(model)
    result: onnx.ModelProto
    result, valid = onnxsim.simplify(model)
    if not valid:
        raise ExportError(
            "onnxsim could not validate its own result; expected an equal graph, try another "
            "version of onnxsim"
        )
    if _signature(result) != before:
        raise ExportError(
            f"onnxsim changed the graph's interface from {before} to {_signature(result)}; "
            "expected the same one, try another version of onnxsim"
        )
    return result


def _signature(model: onnx.ModelProto) -> tuple[list[str], list[str], dict[str, int]]:
    counts = Counter(node.op_type for node in model.graph.node if node.domain == spec.DOMAIN)
    return [v.name for v in model.graph.input], [v.name for v in model.graph.output], dict(counts)
