"""TensorRT-RTX's real parser and builder take what is exported; they need no GPU."""

from __future__ import annotations

import pytest

from tome_export.engine import EngineOptions, select
from tome_export.errors import ExportError
from tome_export.onnx.export import ExportOptions
from tome_export.spec import BatchRange

pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")

BATCH = BatchRange(1, 4, 8)


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("name", ["test_vit", "test_vit2", "test_vit3", "test_vit4"])
def test_parser_and_builder_accept_the_export(export, make_vit, tmp_path, name, precision):
    made = export(make_vit, name, 5, ExportOptions(precision=precision, batch=BATCH), depth=2)
    backend = select("tensorrt-rtx").backend
    info = backend.build(made.path, EngineOptions(batch=BATCH), tmp_path / "model.rtx.engine")
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
    select("tensorrt-rtx").backend.parse(made.path)


def test_scatter_add_is_refused_by_the_parser_as_documented(export, make_vit):
    made = export(make_vit, "test_vit", 5, ExportOptions(batch=BATCH, lowering="index_add"))
    with pytest.raises(ExportError, match="try --merge-op matmul"):
        select("tensorrt-rtx").backend.parse(made.path)
