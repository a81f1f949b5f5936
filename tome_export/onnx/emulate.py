"""A bfloat16 graph as a float32 graph that rounds every result to bfloat16.

ONNX Runtime's CPU kernels do not take bfloat16. Computing each operator in float32 and rounding
its result is what they do for float16, so this gives bf16 artifacts the same proof.
"""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

BF16, FP32 = TensorProto.BFLOAT16, TensorProto.FLOAT


def uses_bfloat16(model: onnx.ModelProto) -> bool:
    """Whether any weight of the model is bfloat16."""
    return any(tensor.data_type == BF16 for tensor in model.graph.initializer)


def emulate_bfloat16(model: onnx.ModelProto) -> onnx.ModelProto:
    """Rewrite a bfloat16 model for runtimes that have float32 only.

    Requires: a dtype known for every tensor (as ``files.check`` ensures on export).
    Ensures: the same inputs and outputs; every tensor that was bfloat16 is float32 and holds a
    value that bfloat16 can hold.
    """
    half = _bfloat16_values(model)
    wide_model = onnx.ModelProto()
    wide_model.CopyFrom(model)
    graph = wide_model.graph
    for value in graph.value_info:
        if value.type.tensor_type.elem_type == BF16:
            value.type.tensor_type.elem_type = FP32
    for index, tensor in enumerate(graph.initializer):
        if tensor.data_type == BF16:
            wide = numpy_helper.to_array(tensor).astype(np.float32)
            graph.initializer[index].CopyFrom(numpy_helper.from_array(wide, tensor.name))
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        rounded = [name for name in node.output if name in half]
        if node.op_type == "Constant":
            _widen_constant(node)
        if node.op_type == "Cast":
            for attribute in node.attribute:
                if attribute.name == "to" and attribute.i == BF16:
                    attribute.i = FP32
        nodes.append(node)
        for name in rounded:
            exact, narrow = f"{name}.exact", f"{name}.bf16"
            node.output[list(node.output).index(name)] = exact
            nodes.append(helper.make_node("Cast", [exact], [narrow], to=BF16))
            nodes.append(helper.make_node("Cast", [narrow], [name], to=FP32))
    del graph.node[:]
    graph.node.extend(nodes)
    return wide_model


def _bfloat16_values(model: onnx.ModelProto) -> set[str]:
    """Names of all bfloat16 tensors between the nodes.

    Inference runs without the weights' values, so that a model above protobuf's 2 GB passes.
    """
    light = onnx.ModelProto()
    light.CopyFrom(model)
    for tensor in light.graph.initializer:
        if tensor.data_type == BF16:
            tensor.ClearField("raw_data")
            tensor.data_location = TensorProto.EXTERNAL
            tensor.external_data.add(key="location", value="weights")
    inferred = onnx.shape_inference.infer_shapes(light, check_type=True)
    values = inferred.graph.value_info
    return {v.name for v in values if v.type.tensor_type.elem_type == BF16}


def _widen_constant(node: onnx.NodeProto) -> None:
    for attribute in node.attribute:
        if attribute.name == "value" and attribute.t.data_type == BF16:
            wide = numpy_helper.to_array(attribute.t).astype(np.float32)
            attribute.t.CopyFrom(numpy_helper.from_array(wide))
