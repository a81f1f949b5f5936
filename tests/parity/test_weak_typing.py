"""A runtime that gives up the graph's types is caught: float32 in it is computed in float16.

That is what ONNX Runtime's TensorRT provider does where its options name a precision. Here every
result, weight and constant that is float32 is rounded to float16, by a rewrite of the graph that is
handed to the same check as an engine would be.
"""

from __future__ import annotations

from functools import partial

import numpy as np
import onnx
import onnx.inliner
import pytest
from onnx import TensorProto, helper

from tome_export.merge import spec
from tome_export.onnx.export import OPSET, ExportOptions, onnx_from_model
from tome_export.onnx.functions import match_function, merge_function
from tome_export.parity.compare import check_parity, fp32_score_bound
from tome_export.parity.decisions import Plan, cosine_scores, disagreements
from tome_export.patch import patch
from tome_export.runtime.ort import OrtRunner
from tome_export.spec import BatchRange

FP32, FP16 = TensorProto.FLOAT, TensorProto.FLOAT16
BATCH = BatchRange(1, 4, 4)


def computed_in_half(model):
    """The same graph, inlined, with each float32 result of a node rounded to float16."""
    inlined = onnx.inliner.inline_local_functions(model)
    graph = onnx.shape_inference.infer_shapes(inlined, check_type=True, strict_mode=True).graph
    typed = {v.name: v.type.tensor_type.elem_type for v in (*graph.value_info, *graph.output)}
    # Weights that are float32 beside half ones; a node's result like all others.
    weights = [w for w in inlined.graph.initializer if w.data_type == FP32]
    nodes = []
    for weight in weights:
        whole = onnx.TensorProto()
        whole.CopyFrom(weight)
        weight.name = f"{whole.name}.single"
        nodes += rounded(weight.name, whole.name)
    for node in inlined.graph.node:
        nodes.append(node)
        for index, name in enumerate(node.output):
            if typed.get(name) == FP32:
                node.output[index] = f"{name}.single"
                nodes += rounded(f"{name}.single", name)
    del inlined.graph.node[:], inlined.graph.value_info[:]
    inlined.graph.node.extend(nodes)
    onnx.checker.check_model(inlined)
    return inlined


def rounded(source, target):
    return [
        helper.make_node("Cast", [source], [f"{target}.half"], to=FP16),
        helper.make_node("Cast", [f"{target}.half"], [target], to=FP32),
    ]


def runner_in_half(model):
    return OrtRunner(computed_in_half(model))


def body(op, function, inputs, outputs, **attributes):
    """A model of one node with its function; inputs and outputs are (name, type, rank)."""
    node = helper.make_node(
        op, [i[0] for i in inputs], [o[0] for o in outputs], domain=spec.DOMAIN, **attributes
    )
    ends = [
        [helper.make_tensor_value_info(name, kind, [None] * rank) for name, kind, rank in part]
        for part in (inputs, outputs)
    ]
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(spec.DOMAIN, spec.VERSION)]
    return helper.make_model(
        helper.make_graph([node], "g", *ends),
        opset_imports=opsets,
        functions=[function],
        ir_version=11,
    )


def results(runner_factory, model, **inputs):
    with runner_factory(model) as runner:
        found = runner.infer(inputs)
    return [found[output.name] for output in model.graph.output]


@pytest.mark.parametrize("class_token", [True, False])
def test_the_body_of_match(class_token):
    """Two partners whose scores differ by 1e-4: 30 times what float32 may be off, 0 in float16."""
    metric = np.zeros((1, 6, 16), np.float32)
    metric[0, :, 0] = [1, 0.1, 1, 0.9, -1, 0.9001]
    metric[0, :, 1] = np.sqrt(1 - metric[0, :, 0] ** 2)
    outputs = [(name, TensorProto.INT32, 2) for name in spec.MATCH_OUTPUTS]
    model = body(
        spec.MATCH,
        match_function(OPSET, class_token=class_token),
        [("keys", FP32, 3)],
        outputs,
        r=1,
        prefix=1,
        class_token=int(class_token),
    )
    exact, half = (
        Plan(*(part[0] for part in results(factory, model, keys=metric)))
        for factory in (OrtRunner, runner_in_half)
    )
    assert exact.targets == {2: 5}
    judge = partial(disagreements, exact, prefix=1, class_token=class_token, image=0)
    scores = cosine_scores(metric[0], 1)
    assert judge(exact, scores) == []
    (found,) = judge(half, scores)
    assert found.margin > 10 * 2 * fp32_score_bound(metric.shape[-1])


@pytest.mark.parametrize("lowering", ["matmul", "index_add"])
def test_the_body_of_merge_loses_counts(lowering):
    """Sizes above 2,048 are not counted one by one in float16."""
    index = TensorProto.INT32
    inputs = [("x", FP32, 3), ("size", FP32, 2), *((n, index, 2) for n in spec.MATCH_OUTPUTS)]
    outputs = [("x_out", FP32, 3), ("size_out", FP32, 2)]
    model = body(spec.MERGE, merge_function(lowering, OPSET), inputs, outputs)
    given = {
        "x": np.ones((1, 3, 4), np.float32),
        "size": np.array([[2048, 3, 1]], np.float32),
        **{
            name: np.array([values], np.int32)
            for name, values in zip(spec.MATCH_OUTPUTS, ([0, 1], [2], [0]), strict=True)
        },
    }
    (_, size), (_, half_size) = (
        results(factory, model, **given) for factory in (OrtRunner, runner_in_half)
    )
    assert size.tolist() == [[2049, 3]]
    assert half_size.tolist() == [[2048, 3]]


@pytest.mark.parametrize("class_token", [True, False])
def test_parity_sees_that_a_model_was_computed_in_half(
    make_vit, make_images, tmp_path, class_token
):
    other = {} if class_token else {"class_token": False, "global_pool": "avg"}
    model = patch(make_vit("test_vit", depth=2, **other), [16, 12])
    assert model.class_token == class_token
    path = tmp_path / "model.onnx"
    onnx_from_model(model, path, ExportOptions(precision="fp16", batch=BATCH), "logits")
    images = make_images(model, 64)

    def check(runner_factory):
        proto = onnx.load(path)
        return check_parity(model, proto, images, "fp16", BATCH, runner_factory=runner_factory)

    right, wrong = check(OrtRunner), check(runner_in_half)
    assert right.failures == ()
    assert right.defects == 0
    assert not wrong.passed
    assert wrong.defects > 0
    assert any("merge decisions do not follow from" in failure for failure in wrong.failures)
