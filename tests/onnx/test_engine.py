"""TensorRT-RTX's real parser and builder take what is exported; they need no GPU."""

from __future__ import annotations

import re

import onnx
import pytest

from tome_export.engine import EngineOptions, select
from tome_export.errors import ExportError
from tome_export.merge import spec
from tome_export.onnx.export import OPSET, ExportOptions
from tome_export.onnx.functions import match_function
from tome_export.onnx.twin import twin_from_model
from tome_export.spec import BatchRange

pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")

BATCH = BatchRange(1, 4, 8)


PRECISIONS = ("fp32", "fp16", "bf16")
each_precision = pytest.mark.parametrize("precision", PRECISIONS)


@each_precision
@pytest.mark.parametrize("name", ["test_vit", "test_vit2", "test_vit3", "test_vit4"])
def test_parser_accepts_the_export(export, make_vit, name, precision):
    made = export(make_vit, name, 5, ExportOptions(precision=precision, batch=BATCH), depth=2)
    select("tensorrt-rtx").builder.parse(made.path)


# One engine of each precision and of each model; all of them are slow.
@pytest.mark.parametrize(
    ("name", "precision"),
    [
        pytest.param(name, precision, marks=() if (at + index) % 3 == 0 else pytest.mark.slow)
        for at, name in enumerate(("test_vit", "test_vit2", "test_vit3", "test_vit4"))
        for index, precision in enumerate(PRECISIONS)
    ],
)
def test_builder_accepts_the_export(export, make_vit, tmp_path, name, precision):
    made = export(make_vit, name, 5, ExportOptions(precision=precision, batch=BATCH), depth=2)
    builder = select("tensorrt-rtx").builder
    info = builder.build(made.path, EngineOptions(batch=BATCH), tmp_path / "model.rtx.engine")
    assert info.size_bytes > 50_000
    assert [t.name for t in info.inputs] == ["pixel_values"]
    assert [(t.name, t.shape, t.dtype) for t in info.outputs] == [("logits", (-1, 10), "float32")]


@pytest.mark.parametrize(
    ("name", "schedule", "kwargs"),
    [
        ("test_vit", 1000, {"class_token": False, "global_pool": "avg"}),
        ("test_vit", [9, 0, 4], {"img_size": 72}),
        ("deit_tiny_distilled_patch16_224", (6, -1.0), {"embed_dim": 64, "num_heads": 2}),
        ("test_vit", 1000, {"reg_tokens": 4}),
    ],
)
def test_parser_accepts_every_prefix_and_clamp(export, make_vit, name, schedule, kwargs):
    options = ExportOptions(precision="fp16", batch=BATCH)
    made = export(make_vit, name, schedule, options, **kwargs)
    select("tensorrt-rtx").builder.parse(made.path)


@each_precision
@pytest.mark.parametrize(
    "batch",
    [
        pytest.param(BATCH, id="dynamic"),
        pytest.param(BatchRange(2, 2, 2), id="static", marks=pytest.mark.slow),
    ],
)
def test_plugin_nodes_are_inlined_where_no_plugin_is(export, make_vit, tmp_path, batch, precision):
    options = ExportOptions(precision=precision, batch=batch, plugin=True)
    made = export(make_vit, "test_vit", 5, options, depth=2)
    builder = select("tensorrt-rtx").builder
    info = builder.build(made.path, EngineOptions(batch=batch), tmp_path / "model.rtx.engine")
    assert info.size_bytes > 50_000


@pytest.mark.parametrize("plugin", [False, True])
@pytest.mark.parametrize(
    "precision", ["fp16", *(pytest.param(p, marks=pytest.mark.slow) for p in ("fp32", "bf16"))]
)
def test_builder_accepts_the_twin(export, make_vit, tmp_path, precision, plugin):
    options = ExportOptions(precision=precision, batch=BATCH, plugin=plugin)
    made = export(make_vit, "test_vit", 5, options, depth=2)
    path = tmp_path / "twin.onnx"
    onnx.save(twin_from_model(made.proto).model, path)
    builder = select("tensorrt-rtx").builder
    info = builder.build(path, EngineOptions(batch=BATCH), tmp_path / "twin.engine")
    outputs = {t.name: (t.shape, t.dtype) for t in info.outputs}
    assert outputs["blocks.1.metric"] == ((-1, 60, 32), "float32")


KERNEL = re.compile(rb"fmha::\w*Kernel_traits\w*<\s*fmha::(\w+)_traits,\s*fmha::(\w+)_traits,")
"""A fused attention kernel's two matrix products, in the source that an engine brings along."""

FP16, FP32 = b"Ampere_hmma_fp16", b"Ampere_hmma_fp32"


@pytest.mark.parametrize(
    ("form", "sums"),
    [("fused", {(FP16, FP16)}), ("fused-fp32", {(FP32, FP32)}), ("parts", {(FP16, FP16)})],
)
def test_what_fused_attention_sums_in(export, make_vit, tmp_path, form, sums):
    """Scores and weighted values of the first two layers: sums in fp16 unless cast up to fp32."""
    options = ExportOptions(precision="fp16", batch=BATCH, attention=form)
    made = export(make_vit, "test_vit", 5, options, depth=2)
    path = tmp_path / "model.rtx.engine"
    select("tensorrt-rtx").builder.build(made.path, EngineOptions(batch=BATCH), path)
    found = KERNEL.findall(path.read_bytes())
    assert len(found) == 2, "an attention is not fused, or this version shows no kernels"
    assert sums <= set(found)
    assert form == "parts" or sums == set(found)


def test_parser_accepts_a_ready_metric(tmp_path):
    value = onnx.helper.make_tensor_value_info
    attributes = dict(spec.PLUGIN_ATTRIBUTES) | {"r": 3, "prefix": 1, "class_token": 1}
    node = onnx.helper.make_node(
        spec.MATCH, ["metric"], spec.MATCH_OUTPUTS, domain=spec.DOMAIN, **attributes
    )
    inputs = [value("metric", onnx.TensorProto.FLOAT16, ["batch", 17, 8])]
    lengths = zip(spec.MATCH_OUTPUTS, (14, 3, 3), strict=True)
    outputs = [value(name, onnx.TensorProto.INT32, ["batch", n]) for name, n in lengths]
    graph = onnx.helper.make_graph([node], "g", inputs, outputs)
    opsets = [onnx.helper.make_opsetid(*pair) for pair in (("", OPSET), (spec.DOMAIN, 1))]
    functions = [match_function(OPSET, class_token=True, plugin=True)]
    path = tmp_path / "model.onnx"
    onnx.save(
        onnx.helper.make_model(graph, opset_imports=opsets, functions=functions, ir_version=11),
        path,
    )
    select("tensorrt-rtx").builder.parse(path)


def test_scatter_add_is_refused_by_the_parser_as_documented(export, make_vit):
    made = export(make_vit, "test_vit", 5, ExportOptions(batch=BATCH, lowering="index_add"))
    with pytest.raises(ExportError, match="try --merge-op matmul"):
        select("tensorrt-rtx").builder.parse(made.path)
