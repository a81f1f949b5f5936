"""bfloat16 graphs as float32 graphs: the same roundings, and nothing else changed."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import TensorProto, helper

from tome_export.onnx.emulate import emulate_bfloat16, uses_bfloat16
from tome_export.onnx.export import ExportOptions
from tome_export.spec import BatchRange

OPTIONS = ExportOptions(precision="bf16", batch=BatchRange(1, 2, 4))


def test_every_result_is_a_bfloat16_value_and_rounded_once():
    """(x + w) * w with both results rounded, as torch does it."""
    weight = torch.linspace(0.3, 3.1, 64).bfloat16()
    tensor = helper.make_tensor("w", TensorProto.BFLOAT16, [64], weight.float().tolist())
    nodes = [
        helper.make_node("Cast", ["x"], ["h"], to=TensorProto.BFLOAT16),
        helper.make_node("Add", ["h", "w"], ["s"]),
        helper.make_node("Mul", ["s", "w"], ["p"]),
        helper.make_node("Cast", ["p"], ["y"], to=TensorProto.FLOAT),
    ]
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [64]) for n in "xy"]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], [tensor])
    opset = [helper.make_opsetid("", 23)]
    model = helper.make_model(graph, opset_imports=opset, ir_version=11)
    assert uses_bfloat16(model)
    twin = emulate_bfloat16(model)
    assert not uses_bfloat16(twin)
    onnx.checker.check_model(twin, full_check=True)
    x = torch.linspace(-5, 5, 64)
    session = onnxruntime.InferenceSession(
        twin.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    expected = ((x.bfloat16() + weight) * weight).float().numpy()
    np.testing.assert_array_equal(session.run(None, {"x": x.numpy()})[0], expected)


def test_whole_model_keeps_its_interface(export, make_vit):
    made = export(make_vit, "test_vit2", 5, OPTIONS)
    before = made.proto.SerializeToString()
    twin = emulate_bfloat16(made.proto)
    assert made.proto.SerializeToString() == before
    assert list(twin.graph.input) == list(made.proto.graph.input)
    assert list(twin.graph.output) == list(made.proto.graph.output)
    names = [n.name for n in twin.graph.node if n.domain]
    assert names == [n.name for n in made.proto.graph.node if n.domain]


def test_other_precisions_are_not_emulated(export, make_vit):
    made = export(make_vit, "test_vit", 5, ExportOptions(batch=BatchRange(1, 4, 8)))
    assert not uses_bfloat16(made.proto)
