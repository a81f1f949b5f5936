"""The instrumented twin: it shows every decision, can be led, else is the shipped graph."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper

from tome_export.errors import InputError
from tome_export.merge import spec
from tome_export.onnx.emulate import emulate_bfloat16
from tome_export.onnx.export import OPSET, ExportOptions, onnx_from_model
from tome_export.onnx.functions import match_function
from tome_export.onnx.twin import LEAD, Twin, twin_from_model
from tome_export.patch import patch
from tome_export.reducers import reducer_from_text
from tome_export.spec import BatchRange

BATCH = BatchRange(1, 4, 8)


def session_of(proto):
    return onnxruntime.InferenceSession(
        proto.SerializeToString(), providers=["CPUExecutionProvider"]
    )


@pytest.fixture
def made(export, make_vit):
    return export(make_vit, "test_vit", [7, 0, 9], ExportOptions(batch=BATCH))


def run_twin(twin, images, plans, lead):
    feed = {"pixel_values": images, LEAD: np.full((len(images), 1), lead)}
    for layer in twin.layers:
        feed |= dict(zip(layer.given, plans[layer.layer], strict=True))
    session = session_of(twin.model)
    return dict(zip([o.name for o in session.get_outputs()], session.run(None, feed), strict=True))


def torch_plans(model, images):
    with torch.no_grad():
        output, trace = model.forward_traced(torch.from_numpy(images))
    return output.numpy(), {s.layer: [p.numpy() for p in s.plan] for s in trace}, trace


def test_twin_is_valid_and_the_original_is_not_changed(made):
    before = made.proto.SerializeToString()
    twin = twin_from_model(made.proto)
    assert made.proto.SerializeToString() == before
    onnx.checker.check_model(twin.model, full_check=True)
    assert [layer.layer for layer in twin.layers] == [0, 2]
    assert twin.layers[1].chosen == ("blocks.2.keep", "blocks.2.src", "blocks.2.dst")
    assert twin.layers[1].signals == ("blocks.2.metric",)


def test_free_twin_decides_and_answers_as_the_shipped_graph(made, make_images):
    images = make_images(made.model, 4)
    twin = twin_from_model(made.proto)
    _, plans, trace = torch_plans(made.model, images)
    # What is given must not matter.
    nonsense = {layer: [np.zeros_like(p) for p in parts] for layer, parts in plans.items()}
    results = run_twin(twin, images, nonsense, lead=False)
    shipped = session_of(made.proto).run(None, {"pixel_values": images})[0]
    np.testing.assert_allclose(results["logits"], shipped, rtol=1e-5, atol=1e-6)
    assert {results[layer.signals[0]].dtype for layer in twin.layers} == {np.dtype(np.float32)}
    for step in trace:
        for name, part in zip(("keep", "src", "dst"), step.plan, strict=True):
            np.testing.assert_array_equal(results[f"blocks.{step.layer}.{name}"], part.numpy())
        metric = results[f"blocks.{step.layer}.metric"]
        np.testing.assert_allclose(metric, step.metric.numpy(), rtol=1e-4, atol=1e-5)


def test_led_twin_applies_the_given_plans_and_shows_its_own(made, make_images):
    images, others = make_images(made.model, 3, seed=1), make_images(made.model, 3, seed=2)
    twin = twin_from_model(made.proto)
    _, plans, _ = torch_plans(made.model, others)
    results = run_twin(twin, images, plans, lead=True)
    forced = {layer: type_plan(parts) for layer, parts in plans.items()}
    with torch.no_grad():
        expected, trace = made.model.forward_traced(torch.from_numpy(images), forced)
    np.testing.assert_allclose(results["logits"], expected.numpy(), rtol=1e-4, atol=1e-5)
    for step in trace:
        np.testing.assert_array_equal(results[f"blocks.{step.layer}.src"], step.chosen.src.numpy())
    assert not np.array_equal(results["blocks.0.src"], plans[0][1])


def type_plan(parts):
    from tome_export.merge.plan import MergePlan

    return MergePlan(*(torch.from_numpy(part) for part in parts))


def test_unmerged_model_has_no_layers(export, make_vit):
    made = export(make_vit, "test_vit", 0, ExportOptions(batch=BATCH))
    twin = twin_from_model(made.proto)
    assert twin.layers == ()
    assert [i.name for i in twin.model.graph.input] == ["pixel_values"]


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_metric_of_a_half_precision_graph_is_the_fp32_mean_of_its_keys(
    export, make_vit, make_images, precision
):
    options = ExportOptions(precision=precision, batch=BATCH)
    made = export(make_vit, "test_vit", [7, 0, 9], options)
    twin = twin_from_model(made.proto)
    onnx.checker.check_model(twin.model, full_check=True)
    cast = next(n for n in twin.model.graph.node if n.name == "blocks.0.match/keys_f")
    keys = next(v for v in twin.model.graph.value_info if v.name == cast.input[0])
    shown = emulate_bfloat16(twin.model) if precision == "bf16" else twin.model
    shown.graph.output.append(next(v for v in shown.graph.value_info if v.name == keys.name))
    images = make_images(made.model, 2)
    _, plans, _ = torch_plans(made.model, images)
    results = run_twin(Twin(shown, twin.layers), images, plans, lead=False)
    mean = results[keys.name].astype(np.float64).mean(1)
    metric = results["blocks.0.metric"]
    assert metric.dtype == np.float32
    np.testing.assert_allclose(metric, mean, rtol=1e-6, atol=1e-6)
    # More digits than the precision has: the mean was not rounded to it.
    half = torch.from_numpy(metric).to({"fp16": torch.float16, "bf16": torch.bfloat16}[precision])
    assert not np.array_equal(half.float().numpy(), metric)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("blocks.0.keys", TensorProto.FLOAT),
        ("blocks.0.keys", TensorProto.FLOAT16),
    ],
)
def test_a_ready_metric_is_shown_as_it_is(name, kind):
    """A match of rank 3."""
    value = helper.make_tensor_value_info
    outputs = [f"blocks.0.{part}" for part in spec.MATCH_OUTPUTS]
    attributes = {"r": 3, "prefix": 1, "class_token": 1}
    nodes = [
        helper.make_node("Cast", ["pixel_values"], [name], to=kind),
        helper.make_node(
            spec.MATCH, [name], outputs, name="blocks.0.match", domain=spec.DOMAIN, **attributes
        ),
        helper.make_node("Identity", [outputs[0]], ["logits"]),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [value("pixel_values", TensorProto.FLOAT, ["batch", 13, 8])],
        [value("logits", TensorProto.INT32, ["batch", 10])],
        value_info=[
            value(name, kind, ["batch", 13, 8]),
            *(
                value(output, TensorProto.INT32, ["batch", length])
                for output, length in zip(outputs, (10, 3, 3), strict=True)
            ),
        ],
    )
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(spec.DOMAIN, spec.VERSION)]
    functions = [match_function(OPSET, class_token=True)]
    proto = helper.make_model(graph, opset_imports=opsets, functions=functions, ir_version=11)
    twin = twin_from_model(proto)
    onnx.checker.check_model(twin.model, full_check=True)
    metric = np.random.default_rng(0).standard_normal((2, 13, 8), dtype=np.float32)
    given = {0: [np.zeros((2, n), np.int32) for n in (10, 3, 3)]}
    results = run_twin(twin, metric, given, lead=False)
    tolerance = 0 if kind == TensorProto.FLOAT else 1e-3
    np.testing.assert_allclose(results["blocks.0.metric"], metric, rtol=tolerance)
    assert results["blocks.0.metric"].dtype == np.float32


@pytest.mark.parametrize("name", ["", "match_0", "blocks.x.match"])
def test_foreign_names_are_refused(export, make_vit, name):
    options = ExportOptions(batch=BATCH, plugin=True)
    proto = onnx.ModelProto()
    proto.CopyFrom(export(make_vit, "test_vit", [7, 0, 9], options).proto)
    next(n for n in proto.graph.node if n.op_type == "TomeMatch").name = name
    with pytest.raises(InputError, match=r"expected 'blocks\.<layer>\.match'"):
        twin_from_model(proto)


@pytest.mark.parametrize("batch", [BATCH, BatchRange(2, 2, 2)], ids=["dynamic", "static"])
def test_plans_of_scores_are_shown_and_led(make_vit, make_images, tmp_path, batch):
    """TopK drops tokens: with a static batch its dst is a constant, which is a decision as well."""
    model = patch(make_vit("test_vit", depth=2), 5, reducer=reducer_from_text("topk", ()))
    path = tmp_path / "model.onnx"
    onnx_from_model(model, path, ExportOptions(batch=batch), "logits")
    proto = onnx.load(path)
    assert {node.domain for node in proto.graph.node} == {""}
    constants = {weight.name for weight in proto.graph.initializer}
    assert ("blocks.1.dst" in constants) == batch.is_static
    twin = twin_from_model(proto)
    onnx.checker.check_model(twin.model, full_check=True)
    assert [layer.signals for layer in twin.layers] == [(f"blocks.{i}.signal.0",) for i in (0, 1)]
    images, others = make_images(model, 2, seed=1), make_images(model, 2, seed=2)
    _, plans, _ = torch_plans(model, others)
    results = run_twin(twin, images, plans, lead=True)
    forced = {layer: type_plan(parts) for layer, parts in plans.items()}
    with torch.no_grad():
        expected, trace = model.forward_traced(torch.from_numpy(images), forced)
    np.testing.assert_allclose(results["logits"], expected.numpy(), rtol=1e-4, atol=1e-5)
    for step in trace:
        np.testing.assert_array_equal(results[f"blocks.{step.layer}.src"], step.chosen.src.numpy())
