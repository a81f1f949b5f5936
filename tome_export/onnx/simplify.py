"""Graph simplification by onnxsim, with what it must not break checked afterwards."""

from __future__ import annotations

from collections import Counter

import onnx

from tome_export.errors import ExportError
from tome_export.merge import spec
from tome_export.onnx import files
from tome_export.onnx.names import decision_of_tensor

HEAVY_BYTES = 1 << 16
"""Weights above this stay out of onnxsim's hands in a large model."""


def simplified(model: onnx.ModelProto) -> onnx.ModelProto:
    """Fold constants and drop dead nodes.

    Requires functions attached for the nodes that call them.
    Ensures the same inputs and outputs; every tensor that is a merge's decision under its name
    (``onnx.names``), with its shape; and every node for plugins still in place with its attributes.

    Raises:
        ExportError: if onnxsim cannot validate its own result.
    """
    import onnxsim

    shown = _show_decisions(model.graph)
    before = _signature(model)
    result, valid = _simplified_light(model) if _is_large(model) else onnxsim.simplify(model)
    if not valid:
        raise ExportError(
            "onnxsim could not validate its own result; expected an equal graph, try another "
            "version of onnxsim"
        )
    if _merge_nodes(result) != _merge_nodes(model):
        raise ExportError(
            "onnxsim changed the attributes of the match and merge nodes; expected them as they "
            "were, try another version of onnxsim"
        )
    if _signature(result) != before:
        raise ExportError(
            f"onnxsim changed the graph's interface from {before} to {_signature(result)}; "
            "expected the same one, try another version of onnxsim"
        )
    result.graph.value_info.extend(v for v in result.graph.output if v.name in shown)
    outputs = [value for value in result.graph.output if value.name not in shown]
    del result.graph.output[:]
    result.graph.output.extend(outputs)
    return result


def _show_decisions(graph: onnx.GraphProto) -> set[str]:
    """Make outputs of a graph's decisions for the time being, whose names then stay."""
    values = {value.name: value for value in (*graph.value_info, *graph.output)}
    names = [name for node in graph.node for name in node.output if decision_of_tensor(name)]
    shown = [name for name in names if name not in {value.name for value in graph.output}]
    graph.output.extend(values[name] for name in shown)
    return set(shown)


def _is_large(model: onnx.ModelProto) -> bool:
    return files.weight_bytes(model) > files.LARGE_BYTES


def _simplified_light(model: onnx.ModelProto) -> tuple[onnx.ModelProto, bool]:
    """As onnxsim does it, with the large weights out of its hands: it copies them several times.

    They are inputs for the time being, so that what is computed of them alone stays in the graph.
    """
    import onnxsim

    light = files.without_weights(model)
    heavy = {t.name: t for t in model.graph.initializer if len(t.raw_data) > HEAVY_BYTES}
    light.graph.initializer.extend(t for t in model.graph.initializer if t.name not in heavy)
    light.graph.input.extend(
        onnx.helper.make_tensor_value_info(name, tensor.data_type, tensor.dims)
        for name, tensor in heavy.items()
    )
    result: onnx.ModelProto
    result, valid = onnxsim.simplify(light)
    inputs = [value for value in result.graph.input if value.name not in heavy]
    used = {name for node in result.graph.node for name in node.input}
    del result.graph.input[:]
    result.graph.input.extend(inputs)
    result.graph.initializer.extend(t for name, t in heavy.items() if name in used)
    return result, valid


def _merge_nodes(model: onnx.ModelProto) -> list[tuple[str, list[bytes]]]:
    """Names and attributes of the match and merge nodes, in any order of either."""
    return sorted(
        (node.name, sorted(a.SerializeToString(deterministic=True) for a in node.attribute))
        for node in model.graph.node
        if node.domain == spec.DOMAIN
    )


def _signature(model: onnx.ModelProto) -> tuple[list[str], list[str], dict[str, int]]:
    counts = Counter(node.op_type for node in model.graph.node if node.domain == spec.DOMAIN)
    return [v.name for v in model.graph.input], [v.name for v in model.graph.output], dict(counts)
