"""Small real graphs for the builder, made with onnx.helper."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

TOKENS, WIDTH, HEADS = 17, 64, 4
TYPES = {"fp32": TensorProto.FLOAT, "fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}

SaveVit = Callable[..., Path]


def vit(
    precision: str = "fp16", depth: int = 2, batch: str | int = "batch", width: int = WIDTH
) -> onnx.ModelProto:
    """Transformer blocks with opset-23 Attention: pixel_values [B, 17, C] to logits [B, 17, C]."""
    dtype = TYPES[precision]
    rng = np.random.default_rng(0)
    weights: list[onnx.TensorProto] = []
    nodes: list[onnx.NodeProto] = []

    def weight(name: str, *shape: int) -> str:
        values = (rng.standard_normal(shape) / np.sqrt(shape[0])).astype(np.float32)
        if precision == "bf16":
            weights.append(helper.make_tensor(name, dtype, shape, values.ravel().tolist()))
        else:
            values = values.astype(helper.tensor_dtype_to_np_dtype(dtype))
            weights.append(numpy_helper.from_array(values, name))
        return name

    def node(operator: str, inputs: list[str], output: str, **attributes: object) -> str:
        made = helper.make_node(operator, inputs, [output], name=f"node_{output}", **attributes)
        nodes.append(made)
        return output

    x = node("Cast", ["pixel_values"], "x", to=dtype)
    for i in range(depth):
        scale, bias = weight(f"scale{i}", width), weight(f"bias{i}", width)
        normed = node("LayerNormalization", [x, scale, bias], f"normed{i}", epsilon=1e-6)
        qkv = [
            node("MatMul", [normed, weight(f"w{part}{i}", width, width)], f"{part}{i}")
            for part in "qkv"
        ]
        heads = {"q_num_heads": HEADS, "kv_num_heads": HEADS}
        attended = node("Attention", qkv, f"attended{i}", **heads)
        x = node("Add", [x, attended], f"x{i}")
    node("Cast", [x], "logits", to=TensorProto.FLOAT)
    shape = [batch, TOKENS, width]
    graph = helper.make_graph(
        nodes,
        "vit",
        [helper.make_tensor_value_info("pixel_values", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, shape)],
        weights,
    )
    opset = [helper.make_opsetid("", 23)]
    model = helper.make_model(graph, opset_imports=opset, ir_version=11)
    onnx.checker.check_model(model, full_check=True)
    return model


@pytest.fixture
def save_vit(tmp_path: Path) -> SaveVit:
    """Writes ``model.onnx`` into the test's folder; takes the arguments of ``vit``."""

    def save(*, external_data: bool = False, **arguments: object) -> Path:
        path = tmp_path / "model.onnx"
        model = vit(**arguments)  # type: ignore[arg-type]
        external = {"location": "model.onnx.data", "size_threshold": 0}
        onnx.save(model, path, save_as_external_data=external_data, **external)  # type: ignore[arg-type]
        return path

    return save


@pytest.fixture
def save_scatter(tmp_path: Path) -> Callable[[str], Path]:
    """Writes a graph with a scatter-add by that operator, which the parsers refuse."""

    def save(operator: str) -> Path:
        elements = operator == "ScatterElements"
        axis = {"axis": 1} if elements else {}
        scatter = helper.make_node(
            operator, ["x", "index", "update"], ["y"], "adds", reduction="add", **axis
        )
        float_, int64 = TensorProto.FLOAT, TensorProto.INT64
        inputs = [
            helper.make_tensor_value_info("x", float_, ["batch", 9, 4]),
            helper.make_tensor_value_info("index", int64, ["batch", 5, 4 if elements else 2]),
            helper.make_tensor_value_info("update", float_, ["batch", 5, 4]),
        ]
        outputs = [helper.make_tensor_value_info("y", float_, ["batch", 9, 4])]
        graph = helper.make_graph([scatter], "scatter", inputs, outputs)
        path = tmp_path / "scatter.onnx"
        opset = [helper.make_opsetid("", 23)]
        onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=11), path)
        return path

    return save
