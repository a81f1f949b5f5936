"""Every form of attention is PyTorch's; sums that are too coarse fail, and the way out is named."""

from __future__ import annotations

import onnx
import pytest
from onnx import TensorProto, helper

from tome_export.onnx.export import ExportOptions, onnx_from_model
from tome_export.parity.compare import check_parity
from tome_export.patch import patch
from tome_export.runtime.ort import OrtRunner
from tome_export.spec import BatchRange

BATCH = BatchRange(1, 4, 4)
FORMS = [("fp32", "fused"), ("fp16", "parts"), ("fp16", "fused-fp32")]


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """``exported(make_vit, name, precision, form)``: the patched model and a copy of its graph."""
    made = {}

    def get(make_vit, name, precision, form):
        key = name, precision, form
        if key not in made:
            model = patch(make_vit(name, depth=3), [9, 0, 9])
            path = tmp_path_factory.mktemp("attention") / "model.onnx"
            options = ExportOptions(precision=precision, batch=BATCH, attention=form)
            onnx_from_model(model, path, options, "logits")
            made[key] = model, path.read_bytes()
        model, content = made[key]
        return model, onnx.load_from_string(content)

    return get


@pytest.mark.parametrize(("precision", "form"), FORMS)
@pytest.mark.parametrize("name", ["test_vit", "test_vit3"])
def test_every_form_is_pytorchs(exported, make_vit, make_images, name, precision, form):
    """Written as ``auto`` writes it, attention is tried in ``test_check``."""
    model, proto = exported(make_vit, name, precision, form)
    assert any(node.op_type == "Attention" for node in proto.graph.node) == (form != "parts")
    report = check_parity(model, proto, make_images(model, 4), precision, BATCH)
    assert report.failures == ()


def summed_in_eight_bits(model: onnx.ModelProto, *, cast_up: bool = False) -> onnx.ModelProto:
    """Attention whose weighted sum of values is rounded to eight bits after every eighth token.

    Attention that is cast up to float32 keeps its exact sums, as in TensorRT, unless ``cast_up``.
    """
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    graph = changed.graph
    shapes = {
        value.name: [d.dim_value for d in value.type.tensor_type.shape.dim]
        for value in graph.value_info
    }
    casts = {node.output[0] for node in graph.node if node.op_type == "Cast"}
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        if node.op_type == "Attention" and (cast_up or node.input[0] not in casts):
            nodes += _coarse(node, shapes[node.output[0]][2], graph)
        else:
            nodes.append(node)
    del graph.node[:]
    graph.node.extend(nodes)
    return changed


def _coarse(attention: onnx.NodeProto, tokens: int, graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    nodes: list[onnx.NodeProto] = []
    out = attention.output[0]

    def add(operator: str, *inputs: str, **attributes: object) -> str:
        name = f"{out}.{len(nodes)}"
        nodes.append(helper.make_node(operator, inputs, [name], **attributes))
        return name

    def constant(values: list[int] | float) -> str:
        whole = isinstance(values, list)
        name = f"{out}.constant{len(graph.initializer)}"
        kind, dims = (TensorProto.INT64, [len(values)]) if whole else (TensorProto.FLOAT, [])
        graph.initializer.append(
            helper.make_tensor(name, kind, dims, values if whole else [values])
        )
        return name

    q, k, v, *mask = (add("Cast", name, to=TensorProto.FLOAT) for name in attention.input)
    scale = next(a.f for a in attention.attribute if a.name == "scale")
    scores = add("MatMul", add("Mul", q, constant(scale)), add("Transpose", k, perm=[0, 1, 3, 2]))
    weights = add("Softmax", add("Add", scores, *mask) if mask else scores, axis=-1)
    total = ""
    for start in range(0, tokens, 8):
        ends = constant([start]), constant([start + 8])
        part = add(
            "MatMul",
            add("Slice", weights, *ends, constant([3])),
            add("Slice", v, *ends, constant([2])),
        )
        total = add("Add", total, part) if total else part
        total = add("Cast", add("Cast", total, to=TensorProto.FLOAT8E4M3FN), to=TensorProto.FLOAT)
    kind = TensorProto.FLOAT16 if out in _halves(graph) else TensorProto.FLOAT
    nodes.append(helper.make_node("Cast", [total], [out], to=kind))
    return nodes


def _halves(graph: onnx.GraphProto) -> set[str]:
    return {
        value.name
        for value in graph.value_info
        if value.type.tensor_type.elem_type == TensorProto.FLOAT16
    }


ADVICE = "; if fused attention is why, build with --attention "


def test_coarse_sums_fail_and_the_option_is_named(exported, make_vit, make_images):
    """What stands for an engine sums coarsely unless attention is cast up: the named way out."""
    model, fused = exported(make_vit, "test_vit", "fp16", "fused")
    images = make_images(model, 4)

    def check(proto, **options):
        return check_parity(model, proto, images, "fp16", BATCH, **options)

    def engine(graph):
        return OrtRunner(summed_in_eight_bits(graph))

    failed = check(fused, runner_factory=engine, engine=True)
    assert not failed.passed
    assert failed.led_output.max_abs > failed.led_allowed
    assert failed.failures[0].endswith(f"{ADVICE}fused-fp32"), failed.failures
    _, cast_up = exported(make_vit, "test_vit", "fp16", "fused-fp32")
    assert check(cast_up, runner_factory=engine, engine=True).failures == ()

    elsewhere = check(fused, runner_factory=engine)
    assert elsewhere.failures[0].endswith(f"{ADVICE}parts")
    _, parts = exported(make_vit, "test_vit", "fp16", "parts")
    assert check(parts, runner_factory=engine).failures == ()

    def coarser(graph):
        return OrtRunner(summed_in_eight_bits(graph, cast_up=True))

    still = check(cast_up, runner_factory=coarser, engine=True)
    assert still.failures[0].endswith(f"{ADVICE}parts")


@pytest.mark.parametrize(("precision", "form"), [("fp16", "parts"), ("fp32", "fused")])
def test_no_option_is_named_where_none_would_help(exported, make_vit, make_images, precision, form):
    model, proto = exported(make_vit, "test_vit", precision, form)
    name = next(n for n in proto.graph.node if "blocks.1.mlp.fc1" in (n.name + str(n.input))).input
    bias = next(t for t in proto.graph.initializer if t.name in name)
    values = onnx.numpy_helper.to_array(bias)
    bias.CopyFrom(onnx.numpy_helper.from_array((values + 1).astype(values.dtype), bias.name))
    report = check_parity(model, proto, make_images(model, 4), precision, BATCH, engine=True)
    assert not report.led_output.max_abs <= report.led_allowed
    assert report.failures
    assert not any("--attention" in failure for failure in report.failures)
