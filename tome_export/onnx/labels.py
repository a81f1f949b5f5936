"""A copy of a graph whose nodes and tensors carry their group, for reading a runtime's profile.

Runtimes inline functions, fuse nodes and insert new ones, and name what results after the nodes
and tensors it came from. In the copy those names are labels, so that they tell where the time of
any such node belongs.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import onnx
from onnx import inliner

from tome_export.merge import spec
from tome_export.onnx.groups import MATCH, MERGE, Place, places

_LABEL = re.compile(r"tome_export/(\d+|-)/([a-z+]+)/\d+")


def place_of_label(text: str) -> Place | None:
    """The place in a name that was made from labels; None if there is none in it."""
    found = _LABEL.search(text)
    if found is None:
        return None
    return Place(None if found[1] == "-" else int(found[1]), found[2])


def labelled(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy of a model that computes the same, functions inlined, every name a label.

    The weights' names, and those of the inputs and outputs, stay.

    Args:
        model: Exported by this package, with its weights; not changed.
    """
    graph = onnx.GraphProto()
    graph.CopyFrom(model.graph)
    where = places(graph)
    weights = list(graph.initializer)
    del graph.initializer[:]
    light = onnx.ModelProto()
    light.CopyFrom(_without_graph(model))
    light.graph.CopyFrom(graph)
    groups = dict.fromkeys((spec.MATCH, spec.PLAN, spec.SIGNAL), MATCH) | {spec.MERGE: MERGE}
    layers: dict[str, list[int | None]] = {name: [] for name in groups}
    numbers: Iterator[int] = iter(range(1 << 62))
    for node, place in zip(light.graph.node, where, strict=True):
        if node.domain == spec.DOMAIN:
            layers[node.op_type].append(place.layer)
        node.name = _label(place, next(numbers))
    # One function at a time: what has no label yet is then of this one, and its calls are apart.
    for function, group in groups.items():
        if layers[function]:
            light = inliner.inline_selected_functions(light, [(spec.DOMAIN, function)])
            _label_inlined(light.graph, group, layers[function], numbers)
    _resolve_casts(light.graph)
    _label_tensors(light.graph)
    light.graph.initializer.extend(weights)
    return light


def _without_graph(model: onnx.ModelProto) -> onnx.ModelProto:
    """Everything of a model but its graph."""
    shell = onnx.ModelProto(ir_version=model.ir_version, producer_name=model.producer_name)
    shell.opset_import.extend(model.opset_import)
    shell.functions.extend(model.functions)
    return shell


def _label(place: Place, number: int) -> str:
    return f"tome_export/{'-' if place.layer is None else place.layer}/{place.group}/{number}"


def _label_inlined(
    graph: onnx.GraphProto, group: str, layers: list[int | None], numbers: Iterator[int]
) -> None:
    """Label the bodies that took the place of a function's calls, each an unbroken run of nodes."""
    calls = iter(layers)
    layer: int | None = None
    inside = False
    for node in graph.node:
        if place_of_label(node.name) is not None:
            inside = False
            continue
        if not inside:
            layer, inside = next(calls), True
        node.name = _label(Place(layer, group), next(numbers))


def _resolve_casts(graph: onnx.GraphProto) -> None:
    """Write the type into ``CastLike``, as the runtime does when it inlines a function itself."""
    values = (*graph.value_info, *graph.output)
    dtypes = {value.name: value.type.tensor_type.elem_type for value in values}
    for node in graph.node:
        if node.op_type == "CastLike" and node.output[0] in dtypes:
            to = onnx.helper.make_attribute("to", dtypes[node.output[0]])
            node.op_type = "Cast"
            node.input[:] = node.input[:1]
            node.attribute.append(to)


def _label_tensors(graph: onnx.GraphProto) -> None:
    """Name every tensor between the nodes after the node it comes from."""
    fixed = {value.name for value in (*graph.input, *graph.output)}
    names: dict[str, str] = {}
    for node in graph.node:
        for index, name in enumerate(node.output):
            if name and name not in fixed:
                names[name] = f"{node.name}/{index}"
    for node in graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]
        node.output[:] = [names.get(name, name) for name in node.output]
    for value in graph.value_info:
        value.name = names.get(value.name, value.name)
