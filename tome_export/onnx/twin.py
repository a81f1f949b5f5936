"""An instrumented twin of an exported graph: it shows every merge decision and can be led.

The twin is the shipped graph plus, for each merging layer, outputs for the metric and the chosen
plan, which are found by their names, and a switch that replaces the chosen plan by one given as
input. A match that is one node for a plugin shows no metric, so it is made beside it from the same
keys. Led by the reference's plans, every layer sees the reference's tokens, so each decision can be
judged on its own and the numerical error is not mixed with the effect of a flipped decision.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import onnx
from onnx import TensorProto, helper

from tome_export.errors import InputError
from tome_export.merge import spec
from tome_export.merge.plan import Step, step_from_name, step_layer, step_name, step_number
from tome_export.onnx.functions import expanded, metric_of
from tome_export.onnx.names import decision_of_tensor

METADATA_PREFIX = "tome_export."

LEAD = "tome_export.lead"
"""Bool input ``[B, 1]``: whether the plans given as inputs are applied.

One per image, not a scalar: the first dimension of every input of an engine is the batch.
"""

LEAD_EACH = "tome_export.lead_each"


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
    """Instrument a model exported by this package."""
    twin = model
    if not consume:
        twin = onnx.ModelProto()
        twin.CopyFrom(model)
    graph = twin.graph
    batch = _dims(graph.input[0])[0]
    values = {value.name: value for value in (*graph.input, *graph.value_info, *graph.output)}
    several = _sequences(model)
    behind: dict[str, list[onnx.NodeProto]] = defaultdict(list)  # what follows a tensor's maker
    led: dict[str, str] = {}
    layers: list[TwinLayer] = []

    def show(name: str, dtype: int, shape: list[str | int]) -> str:
        """Make an output of a tensor ``[B S, ...]``, as ``[B, S, ...]`` of several sequences."""
        shown = name
        if len(shape) > len(_dims(values[name])):
            shown = f"{name}.rows"
            behind[name] += _reshape(name, shown, [-1, *shape[1:]])
        graph.output.append(helper.make_tensor_value_info(shown, dtype, shape))
        return shown

    for match in [node for node in graph.node if node.op_type == spec.MATCH]:
        _show_metric_of_plugin(twin, match, values, behind)
    for step, parts in _decisions([*values, *(w.name for w in graph.initializer)]):
        count = several.get(step_name(step), 1)
        rows = [batch, *([count] * (count > 1))]
        chosen, given, signals = [], [], []
        for part in spec.MATCH_OUTPUTS:
            name = parts[part]
            shape = [*rows, *_dims(values[name])[1:]]
            chosen.append(show(name, TensorProto.INT32, shape))
            given.append(f"{name}.given")
            graph.input.append(helper.make_tensor_value_info(given[-1], TensorProto.INT32, shape))
            led[name] = f"{name}.led"
            behind[name] += _switch(chosen[-1], given[-1], led[name], shape)
        for part in sorted(parts):
            if part == "metric" or part.startswith("signal"):
                value = values[parts[part]]
                kind = value.type.tensor_type.elem_type
                signals.append(show(value.name, kind, [*rows, *_dims(value)[1:]]))
        layers.append(TwinLayer(step, tuple(signals), (*chosen,), (*given,), count))  # type: ignore[arg-type]
    nodes: list[onnx.NodeProto] = []
    if layers:
        graph.input.append(helper.make_tensor_value_info(LEAD, TensorProto.BOOL, [batch, 1]))
    if several:
        # The first dimension of this is the batch, as of every input; here for [B, S, K].
        nodes += _reshape(LEAD, LEAD_EACH, [-1, 1, 1])
    for weight in graph.initializer:
        nodes += behind[weight.name]
    for node in graph.node:
        node.input[:] = [led.get(name, name) for name in node.input]
        nodes.append(node)
        for name in node.output:
            nodes += behind[name]
    del graph.node[:]
    graph.node.extend(nodes)
    return Twin(twin, tuple(layers))


def _decisions(names: Iterable[str]) -> list[tuple[Step, dict[str, str]]]:
    """The tensors that each merge decides and is decided by, by their parts, in order."""
    found: dict[Step, dict[str, str]] = defaultdict(dict)
    for name in names:
        decision, step = decision_of_tensor(name), step_from_name(name)
        if decision is not None and step is not None:
            found[step][decision[1]] = name
    complete = (step for step, parts in found.items() if "keep" in parts)
    return [(step, found[step]) for step in sorted(complete, key=step_number)]


def _show_metric_of_plugin(
    model: onnx.ModelProto,
    match: onnx.NodeProto,
    values: dict[str, onnx.ValueInfoProto],
    behind: dict[str, list[onnx.NodeProto]],
) -> None:
    """Make the metric of a match that is one node beside it, as its body makes it."""
    if step_from_name(match.name) is None:
        raise InputError(
            f"match node is named {match.name!r}; expected 'blocks.<layer>.match', as this package "
            "writes it: rebuild the artifact"
        )
    body = next(function for function in model.functions if function.name == spec.MATCH)
    metric = metric_of(match, values[match.input[0]].type.tensor_type)
    values[metric.name] = metric
    for node in expanded(match, body, {}):
        behind[match.output[0]].append(node)
        if metric.name in node.output:
            break


def _dims(value: onnx.ValueInfoProto) -> list[str | int]:
    return [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]


def _switch(shown: str, given: str, new: str, shape: list[str | int]) -> list[onnx.NodeProto]:
    """Nodes that make ``new [B S, K]`` of what the graph chose, or of what it is led by.

    ``shown`` and ``given`` have the shape: ``[B, K]``, or ``[B, S, K]`` of several sequences.
    """
    if len(shape) == 2:
        return [helper.make_node("Where", [LEAD, given, shown], [new], name=f"{new}.where")]
    mixed = f"{new}.rows"
    where = helper.make_node("Where", [LEAD_EACH, given, shown], [mixed], name=f"{new}.where")
    return [where, *_reshape(mixed, new, [-1, shape[2]])]


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
