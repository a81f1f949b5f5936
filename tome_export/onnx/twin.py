"""An instrumented twin of an exported graph: it shows every merge decision and can be led.

The twin is the shipped graph plus, for each merging layer, outputs for the metric and the chosen
plan, and a switch that replaces the chosen plan by one given as input. The match takes keys, so the
metric is made beside it from the same keys, or from the product that holds them. Led by the
reference's plans, every layer sees the reference's tokens, so each decision can be judged on its
own and the numerical error is not mixed with the effect of a flipped decision.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from tome_export.errors import InputError
from tome_export.merge import spec
from tome_export.merge.plan import Step, step_from_name, step_layer, step_name
from tome_export.onnx.merging import keys_attributes

METADATA_PREFIX = "tome_export."

LEAD = "tome_export.lead"
"""Bool input ``[B, 1]``: whether the plans given as inputs are applied.

One per image, not a scalar: the first dimension of every input of an engine is the batch.
"""

LEAD_EACH = "tome_export.lead_each"

HEADS_AXIS = "tome_export.heads_axis"


@dataclass(frozen=True)
class TwinLayer:
    """Tensor names of one merging layer in the twin.

    Attributes:
        step: Which of the model's merges it is.
        signals: What the decision hangs on, float32: the metric ``[B, N, D]`` of a match, else the
            scores of the reducer.
        chosen: ``keep``, ``src`` and ``dst`` as the graph chose them.
        given: Inputs, those to apply when the twin is led.
        sequences: Sequences S of one input that it works on. With more than one, everything here
            is ``[B, S, ...]``, because the first dimension of what goes into an engine or comes
            out of it is the batch.
    """

    step: Step
    signals: tuple[str, ...]
    chosen: tuple[str, str, str]
    given: tuple[str, str, str]
    sequences: int = 1

    @property
    def layer(self) -> int:
        """Index of the block."""
        return step_layer(self.step)


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
    scores: dict[Step, list[str]] = {}
    several = _sequences(model)
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        nodes.append(node)
        if node.op_type == spec.SIGNAL:
            scores.setdefault(_step_of(node), []).append(node.output[0])
            graph.output.append(types[node.output[0]])
        if node.op_type not in (spec.MATCH, spec.PLAN):
            continue
        step = _step_of(node)
        count = several.get(step_name(step), 1)
        chosen = tuple(node.output)
        led = tuple(f"{name}.led" for name in chosen)
        given = tuple(f"{name}.given" for name in chosen)
        rows = [batch.dim_param or batch.dim_value, *([count] * (count > 1))]
        shown = []
        for name, source, new in zip(chosen, given, led, strict=True):
            value = types[name]
            shape = [*rows, value.type.tensor_type.shape.dim[1].dim_value]
            graph.input.append(helper.make_tensor_value_info(source, TensorProto.INT32, shape))
            added, first, name_shown = _switch(name, source, new, shape)
            nodes += added
            _rewire(graph, name, new, first)
            shown.append(name_shown)
            if count == 1:
                graph.output.append(value)
            else:
                info = helper.make_tensor_value_info(name_shown, TensorProto.INT32, shape)
                graph.output.append(info)
        signals = tuple(scores.get(step, ()))
        if node.op_type == spec.MATCH:
            metric = f"{step_name(step)}.metric"
            taken = types[node.input[0]]
            lengths = [dim.dim_value for dim in taken.type.tensor_type.shape.dim][1:]
            view = spec.keys_view(lengths, **keys_attributes(node))
            nodes += _metric_nodes(node, len(lengths), metric)
            info = helper.make_tensor_value_info(
                metric, TensorProto.FLOAT, [*rows, view.tokens, view.width]
            )
            if count > 1:
                target = f"{metric}.rows"
                nodes += _reshape(metric, target, [-1, *_dims(info)[1:]])
                info.name = target
            graph.output.append(info)
            signals = (info.name,)
        layers.append(TwinLayer(step, signals, (*shown,), (*given,), count))  # type: ignore[arg-type]
    if layers:
        shape = [batch.dim_param or batch.dim_value, 1]
        graph.input.append(helper.make_tensor_value_info(LEAD, TensorProto.BOOL, shape))
        graph.initializer.append(numpy_helper.from_array(np.array([1], np.int64), HEADS_AXIS))
        if several:
            # The first dimension of this is the batch, as of every input; here for [B, S, K].
            nodes.insert(0, helper.make_node("Unsqueeze", [LEAD, HEADS_AXIS], [LEAD_EACH]))
    del graph.node[:]
    graph.node.extend(nodes)
    return Twin(twin, tuple(layers))


def _metric_nodes(match: onnx.NodeProto, lengths: int, metric: str) -> list[onnx.NodeProto]:
    """The mean of the keys over heads; an input ``[B, N, D]`` without heads is the metric itself.

    Args:
        match: The node.
        lengths: Dimensions of its input behind the batch.
        metric: Name of what is made.
    """
    keys, where = match.input[0], keys_attributes(match)
    if keys == metric:  # as graphs of operators without heads name it
        return []
    if where["heads"]:
        return _metric_from_product(keys, metric, **where)
    if lengths == 2:
        return [helper.make_node("Cast", [keys], [metric], name=metric, to=TensorProto.FLOAT)]
    wide = f"{metric}.keys"
    return [
        helper.make_node("Cast", [keys], [wide], name=wide, to=TensorProto.FLOAT),
        helper.make_node("ReduceMean", [wide, HEADS_AXIS], [metric], name=metric, keepdims=0),
    ]


def _metric_from_product(
    product: str, metric: str, heads: int, width: int, offset: int
) -> list[onnx.NodeProto]:
    """The mean over heads of the columns ``[offset, offset + heads * width)`` of ``[B, N, W]``."""
    parts = [f"{metric}.{name}" for name in ("columns", "begin", "end", "axis", "heads", "keys")]
    columns, begin, end, axis, by_head, wide = parts
    constants = ((begin, offset), (end, offset + heads * width), (axis, 2))
    return [
        *(
            helper.make_node("Constant", [], [name], name=name, value_ints=[value])
            for name, value in constants
        ),
        helper.make_node("Slice", [product, begin, end, axis], [columns], name=columns),
        *_reshape(columns, by_head, [0, 0, heads, width]),
        helper.make_node("Cast", [by_head], [wide], name=wide, to=TensorProto.FLOAT),
        helper.make_node("ReduceMean", [wide, axis], [metric], name=metric, keepdims=0),
    ]


def _dims(value: onnx.ValueInfoProto) -> list[str | int]:
    return [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]


def _switch(
    name: str, given: str, new: str, shape: list[str | int]
) -> tuple[list[onnx.NodeProto], onnx.NodeProto, str]:
    """Nodes that replace a tensor of a plan when led.

    Args:
        name: What the graph chose, ``[B S, K]``.
        given: What it may be led by.
        new: What the rest of the graph reads from now on.
        shape: Of ``given``: ``[B, K]``, or ``[B, S, K]`` of several sequences.

    Returns:
        The nodes, the one that reads ``name``, and the name under which the choice is shown.
    """
    if len(shape) == 2:
        where = helper.make_node("Where", [LEAD, given, name], [new], name=f"{new}.where")
        return [where], where, name
    rows, mixed = f"{name}.rows", f"{new}.rows"
    before = _reshape(name, rows, [-1, *shape[1:]])
    where = helper.make_node("Where", [LEAD_EACH, given, rows], [mixed], name=f"{new}.where")
    after = _reshape(mixed, new, [-1, shape[2]])
    return [*before, where, *after], before[-1], rows


def _reshape(name: str, new: str, shape: list[Any]) -> list[onnx.NodeProto]:
    constant = f"{new}.shape"
    value = helper.make_node("Constant", [], [constant], name=constant, value_ints=shape)
    return [value, helper.make_node("Reshape", [name, constant], [new], name=new)]


def _sequences(model: onnx.ModelProto) -> dict[str, int]:
    """Sequences per input of each merge that has more than one."""
    key = METADATA_PREFIX + spec.SEQUENCES
    found = next((prop.value for prop in model.metadata_props if prop.key == key), "{}")
    counts: dict[str, int] = json.loads(found)
    return counts


def is_twin(model: onnx.ModelProto) -> bool:
    """Whether the model is an instrumented one."""
    return any(value.name == LEAD for value in model.graph.input)


def _step_of(node: onnx.NodeProto) -> Step:
    step = step_from_name(node.name)
    if step is not None:
        return step
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
