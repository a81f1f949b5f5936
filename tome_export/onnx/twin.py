"""An instrumented twin of an exported graph: it shows every merge decision and can be led.

The twin is the shipped graph plus, for each merging layer, outputs for the metric and the chosen
plan, and a switch that replaces the chosen plan by one given as input. The match takes keys, so the
metric is made beside it from the same keys. Led by the reference's plans, every layer sees the
reference's tokens, so each decision can be judged on its own and the numerical error is not mixed
with the effect of a flipped decision.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from tome_export.errors import InputError
from tome_export.merge import spec

LEAD = "tome_export.lead"
"""Bool input ``[B, 1]``: whether the plans given as inputs are applied.

One per image, not a scalar: the first dimension of every input of an engine is the batch.
"""

HEADS_AXIS = "tome_export.heads_axis"


@dataclass(frozen=True)
class TwinLayer:
    """Tensor names of one merging layer in the twin.

    Attributes:
        layer: Index of the block.
        signals: What the decision hangs on, float32: the metric ``[B, N, D]`` of a match, else the
            scores of the reducer.
        chosen: ``keep``, ``src`` and ``dst`` as the graph chose them.
        given: Inputs, those to apply when the twin is led.
    """

    layer: int
    signals: tuple[str, ...]
    chosen: tuple[str, str, str]
    given: tuple[str, str, str]


@dataclass(frozen=True)
class Twin:
    """An instrumented graph and how to read it."""

    model: onnx.ModelProto
    layers: tuple[TwinLayer, ...]


def twin_from_model(model: onnx.ModelProto, *, consume: bool = False) -> Twin:
    """Instrument a model exported by this package.

    Args:
        model: Not changed, unless it is consumed.
        consume: Make the twin of the model itself, which saves a copy of its weights.

    Raises:
        InputError: if a match node does not carry the name the exporter gives it.
    """
    twin = model
    if not consume:
        twin = onnx.ModelProto()
        twin.CopyFrom(model)
    graph = twin.graph
    batch = graph.input[0].type.tensor_type.shape.dim[0]
    types = {value.name: value for value in (*graph.value_info, *graph.output)}
    layers: list[TwinLayer] = []
    scores: dict[int, list[str]] = {}
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        nodes.append(node)
        if node.op_type == spec.SIGNAL:
            scores.setdefault(_layer_of(node), []).append(node.output[0])
            graph.output.append(types[node.output[0]])
        if node.op_type not in (spec.MATCH, spec.PLAN):
            continue
        layer = _layer_of(node)
        chosen = tuple(node.output)
        led = tuple(f"{name}.led" for name in chosen)
        given = tuple(f"{name}.given" for name in chosen)
        for name, source, new in zip(chosen, given, led, strict=True):
            value = types[name]
            length = value.type.tensor_type.shape.dim[1].dim_value
            shape = [batch.dim_param or batch.dim_value, length]
            graph.input.append(helper.make_tensor_value_info(source, TensorProto.INT32, shape))
            switch = helper.make_node("Where", [LEAD, source, name], [new], name=f"{new}.where")
            nodes.append(switch)
            _rewire(graph, name, new, switch)
            graph.output.append(value)
        if node.op_type == spec.PLAN:
            layers.append(TwinLayer(layer, tuple(scores[layer]), (*chosen,), (*given,)))  # type: ignore[arg-type]
            continue
        metric = f"blocks.{layer}.metric"
        nodes += _metric_nodes(node.input[0], types[node.input[0]], metric)
        graph.output.append(_metric_value(types[node.input[0]], metric))
        layers.append(TwinLayer(layer, (metric,), (*chosen,), (*given,)))  # type: ignore[arg-type]
    if layers:
        shape = [batch.dim_param or batch.dim_value, 1]
        graph.input.append(helper.make_tensor_value_info(LEAD, TensorProto.BOOL, shape))
        graph.initializer.append(numpy_helper.from_array(np.array([1], np.int64), HEADS_AXIS))
    del graph.node[:]
    graph.node.extend(nodes)
    return Twin(twin, tuple(layers))


def _metric_nodes(keys: str, value: onnx.ValueInfoProto, metric: str) -> list[onnx.NodeProto]:
    """The mean of the keys over heads; an input of rank 3 is the metric itself."""
    if keys == metric:  # as graphs of operators without heads name it
        return []
    if len(value.type.tensor_type.shape.dim) == 3:
        return [helper.make_node("Cast", [keys], [metric], name=metric, to=TensorProto.FLOAT)]
    wide = f"{metric}.keys"
    return [
        helper.make_node("Cast", [keys], [wide], name=wide, to=TensorProto.FLOAT),
        helper.make_node("ReduceMean", [wide, HEADS_AXIS], [metric], name=metric, keepdims=0),
    ]


def _metric_value(keys: onnx.ValueInfoProto, metric: str) -> onnx.ValueInfoProto:
    dims = list(keys.type.tensor_type.shape.dim)
    shape = [d.dim_param or d.dim_value for d in (dims[0], *dims[-2:])]
    return helper.make_tensor_value_info(metric, TensorProto.FLOAT, shape)


def is_twin(model: onnx.ModelProto) -> bool:
    """Whether the model is an instrumented one."""
    return any(value.name == LEAD for value in model.graph.input)


def _layer_of(node: onnx.NodeProto) -> int:
    parts = node.name.split(".")
    if len(parts) >= 3 and parts[0] == "blocks" and parts[1].isdigit():
        return int(parts[1])
    raise InputError(
        f"match node is named {node.name!r}; expected 'blocks.<layer>.match', as this package "
        "writes it: rebuild the artifact"
    )


def _rewire(graph: onnx.GraphProto, old: str, new: str, switch: onnx.NodeProto) -> None:
    """Let all readers of ``old`` read ``new``, apart from the switch itself."""
    for node in graph.node:
        if node is not switch:
            for index, name in enumerate(node.input):
                if name == old:
                    node.input[index] = new
