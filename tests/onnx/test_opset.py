"""Graphs of older opsets: valid, of the same decisions, and without what came later."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from manifests import manifest
from onnx import TensorProto, helper
from pydantic import ValidationError

from tome_export.build import BuildRequest
from tome_export.errors import ExportError, UsageError
from tome_export.onnx import opset
from tome_export.onnx.export import ExportOptions
from tome_export.parity.compare import check_parity
from tome_export.runtime.ort import OrtRunner
from tome_export.spec import BatchRange

BATCH = BatchRange(1, 2, 8)

# The lowest format that has the opset (onnx.helper), which runtimes of its time read.
FORMATS = {17: 8, 18: 8, 19: 9, 20: 9, 21: 10, 22: 10, 23: 10}


@pytest.mark.parametrize("version", [17, 18, 21, 22])
def test_a_graph_of_an_older_opset_decides_alike(export, make_vit, make_images, version):
    options = ExportOptions(batch=BATCH, opset=version)
    made = export(make_vit, "test_vit", [7, 9], options, depth=2)
    assert {o.domain: o.version for o in made.proto.opset_import} == {"": version}
    assert made.files.opset == version
    assert made.proto.ir_version == FORMATS[version]
    onnx.checker.check_model(made.proto, full_check=True)
    used = {node.op_type for node in made.proto.graph.node}
    assert all(onnx.defs.get_schema(name, version) for name in used)
    assert ("Gelu" in used) == (version >= 20)
    report = check_parity(made.model, made.proto, make_images(made.model, 4), "fp32", BATCH)
    assert report.passed, report.failures
    assert sum(layer.decisions for layer in report.layers) > 0
    assert sum(layer.disagreements for layer in report.layers) == 0


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_half_precision_of_an_older_opset_has_attention_in_parts(export, make_vit, precision):
    options = ExportOptions(precision=precision, batch=BATCH, opset=22)
    made = export(make_vit, "test_vit", [7, 9], options, depth=2)
    assert "Attention" not in {node.op_type for node in made.proto.graph.node}
    assert options.attention_form == "parts"


def test_a_graph_for_plugins_of_opset_17_is_valid(export, make_vit, make_images):
    options = ExportOptions(batch=BATCH, opset=17, plugin=True)
    made = export(make_vit, "test_vit", [7, 9], options, depth=2)
    assert {o.version for f in made.proto.functions for o in f.opset_import} == {17}
    assert made.proto.ir_version == 9  # from which functions declare attributes
    report = check_parity(made.model, made.proto, make_images(made.model, 2), "fp32", BATCH)
    assert report.passed, report.failures


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"opset": 16}, "opset is 16; expected 17 to 23"),
        ({"opset": 24}, "opset is 24; expected 17 to 23"),
        (
            {"opset": 22, "precision": "fp16", "attention": "fused"},
            "--attention fused is an operator of opset 23, and --opset is 22; use --attention "
            "parts, or --opset 23",
        ),
        (
            {"opset": 17, "precision": "fp16", "attention": "fused-fp32"},
            "--attention fused-fp32 is an operator of opset 23, and --opset is 17; use --attention "
            "parts, or --opset 23",
        ),
        (
            {"opset": 21, "precision": "bf16"},
            "--opset is 21 with --bf16, whose convolution ONNX has from opset 22 on; use --fp16, "
            "or --opset 22 or above",
        ),
    ],
)
def test_what_an_opset_lacks_is_refused(given, message, tmp_path):
    for make in (ExportOptions, lambda **more: BuildRequest("vit_digits", tmp_path, **more)):
        with pytest.raises(UsageError) as caught:
            make(**given)
        assert str(caught.value) == message


def small(nodes, *initializers, shape=(2,)):
    """A model of opset 18, from x [2, 4] to y."""
    graph = helper.make_graph(
        nodes,
        "small",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)],
        initializer=list(initializers),
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)


AXES = helper.make_tensor("axes", TensorProto.INT64, [1], [1])


@pytest.mark.parametrize("how", ["initializer", "value", "value_ints"])
def test_axes_become_attributes(how):
    reduce = helper.make_node("ReduceMax", ["x", "axes"], ["y"], keepdims=0)
    if how == "initializer":
        model = small([reduce], AXES)
    else:
        value = {"value": AXES} if how == "value" else {"value_ints": [1]}
        model = small([helper.make_node("Constant", [], ["axes"], **value), reduce])
    opset.lower(model)
    onnx.checker.check_model(model, full_check=True)
    assert [node.op_type for node in model.graph.node] == ["ReduceMax"]
    assert not model.graph.initializer
    x = np.arange(8, dtype=np.float32).reshape(2, 4)
    with OrtRunner(model) as runner:
        assert runner.infer({"x": x})["y"].tolist() == [3, 7]


def test_axes_that_something_else_reads_stay():
    reduce = helper.make_node("ReduceMax", ["x", "axes"], ["m"], keepdims=0)
    model = small([reduce, helper.make_node("Unsqueeze", ["m", "axes"], ["y"])], AXES, shape=(2, 1))
    opset.lower(model)
    onnx.checker.check_model(model, full_check=True)
    assert [tensor.name for tensor in model.graph.initializer] == ["axes"]


def test_equal_parts_need_no_number_of_them():
    split = helper.make_node("Split", ["x"], ["y", "z"], axis=1, num_outputs=2)
    model = small([split], shape=(2, 2))
    opset.lower(model)
    onnx.checker.check_model(model, full_check=True)
    assert [a.name for a in model.graph.node[0].attribute] == ["axis"]


@pytest.mark.parametrize(
    "node",
    [
        helper.make_node("Mish", ["x"], ["y"], name="n"),
        helper.make_node("ReduceMax", ["x", ""], ["y"], name="n", noop_with_empty_axes=1),
        helper.make_node("Resize", ["x", "", "s"], ["y"], name="n", mode="linear", antialias=1),
    ],
    ids=lambda node: node.op_type,
)
def test_what_17_cannot_say_is_refused(node):
    scales = helper.make_tensor("s", TensorProto.FLOAT, [2], [1.0, 0.5])
    with pytest.raises(ExportError) as caught:
        opset.lower(small([node], scales))
    assert str(caught.value) == (
        f"node n is a {node.op_type} that ONNX has from opset 18 on; export with --opset 18 or "
        "above"
    )


@pytest.mark.parametrize(
    ("version", "attention", "said"),
    [
        (16, "parts", "greater than or equal to 17"),
        (24, "parts", "less than or equal to 23"),
        (22, "fused", "opset 22 has no operator for fused attention"),
    ],
)
def test_a_manifest_says_an_opset_that_a_build_writes(version, attention, said):
    form = {"opset": version, "attention": attention, "attention_note": "", "nodes": 9}
    with pytest.raises(ValidationError, match=said):
        manifest(onnx=form)
    assert manifest(onnx=form | {"opset": 23}).onnx.opset == 23
    assert manifest(onnx=form | {"opset": 17, "attention": "parts"}).onnx.opset == 17
