"""A graph of opset 18, the lowest that torch writes, as one of opset 17."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import onnx
from onnx import helper, numpy_helper

from tome_export.errors import ExportError

TRACED = 18
"""Lowest opset that torch's exporter has translations for."""

_NEUTRAL: Mapping[str, Mapping[str, Any]] = {
    "Pad": {},
    "Split": {"num_outputs": None},
    "Resize": {"antialias": 0, "keep_aspect_ratio_policy": b"stretch"},
    "ScatterElements": {},
    "ScatterND": {},
}
"""Attributes that 17 lacks, each with the value for what 17 does; None where every value is."""


def lower(model: onnx.ModelProto) -> None:
    """Rewrite a model's graph and functions in place, from opset 18 to 17.

    Axes of reductions become attributes, and constants go that nothing else reads. Names stay.
    """
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    parts: list[onnx.GraphProto | onnx.FunctionProto] = [model.graph, *model.functions]
    for part in parts:
        made = {node.output[0]: node for node in part.node if node.op_type == "Constant"}
        freed: set[str] = set()
        for node in part.node:
            if onnx.defs.has(node.op_type) and _since(node.op_type) == TRACED:
                freed |= _lower_node(node, made, weights)
        freed -= {name for node in part.node for name in node.input}
        for name in freed & made.keys():
            part.node.remove(made[name])
        for name in freed - made.keys():
            model.graph.initializer.remove(weights[name])
    owners: list[onnx.ModelProto | onnx.FunctionProto] = [model, *model.functions]
    for opset in (opset for owner in owners for opset in owner.opset_import):
        if opset.domain == "":
            opset.version = TRACED - 1


def _since(operator: str) -> int:
    return int(onnx.defs.get_schema(operator, TRACED).since_version)


def _lower_node(
    node: onnx.NodeProto,
    made: Mapping[str, onnx.NodeProto],
    weights: Mapping[str, onnx.TensorProto],
) -> set[str]:
    """Change one node; returns the name of what it no longer reads."""
    refused = ExportError(
        f"node {node.name} is a {node.op_type} that ONNX has from opset {TRACED} on; export with "
        f"--opset {TRACED} or above"
    )
    freed = set()
    reduces = node.op_type.startswith("Reduce")
    if not reduces and node.op_type not in _NEUTRAL:
        raise refused
    if reduces and len(node.input) > 1:
        name = node.input[1]
        if name in weights:
            axes = [int(axis) for axis in numpy_helper.to_array(weights[name])]
        elif name in made:
            axes = _constant(made[name])
        else:
            raise refused
        node.attribute.append(helper.make_attribute("axes", axes))
        del node.input[1:]
        freed.add(name)
    lacking = {"noop_with_empty_axes": 0, **_NEUTRAL.get(node.op_type, {})}
    for attribute in [a for a in node.attribute if a.name in lacking]:
        if lacking[attribute.name] not in (None, helper.get_attribute_value(attribute)):
            raise refused
        node.attribute.remove(attribute)
    return freed


def _constant(node: onnx.NodeProto) -> list[int]:
    value = helper.get_attribute_value(node.attribute[0])
    found = numpy_helper.to_array(value) if isinstance(value, onnx.TensorProto) else value
    return [int(axis) for axis in found]
