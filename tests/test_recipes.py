"""Recipes through the whole chain at reduced depth: export, parity on photographs, engine.

One recipe per structure here; ``benchmarks/recipes.py`` runs every recipe under every schedule.
"""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest

from tome_export.data.samples import sample_pixels
from tome_export.engine import EngineOptions, select
from tome_export.models import resolve
from tome_export.onnx.export import ExportOptions, onnx_from_model
from tome_export.parity.compare import check_parity
from tome_export.patch import patch
from tome_export.spec import BatchRange, Precision

STRUCTURES = ["vit_ti16", "deit_ti16_distilled", "deit3_b16", "dinov2_s14_reg"]


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("name", STRUCTURES)
def test_recipe_through_the_chain(name: str, precision: Precision, tmp_path: Path) -> None:
    recipe = resolve(name)
    loaded = recipe.load(weights="random", depth=2)
    model = patch(loaded.module, recipe.merging.r, prop_attn=recipe.merging.prop_attn)
    path = tmp_path / "model.onnx"
    options = ExportOptions(precision=precision, batch=BatchRange(1, 2, 4))
    onnx_from_model(model, path, options, recipe.output.name)
    images = sample_pixels(recipe, 3)
    report = check_parity(model, onnx.load(path), images, precision, options.batch)
    assert report.passed, report.failures
    assert report.output.cosine > 0.999
    if precision == "fp32":
        assert report.led_output.relative < 1e-5
    backend = select("tensorrt-rtx").builder if _has_rtx() else None
    if backend is None:
        pytest.skip("parity passed; no engine: tensorrt-rtx is not installed")
    info = backend.build(path, EngineOptions(batch=options.batch), tmp_path / backend.file_name)
    assert info.size_bytes == (tmp_path / backend.file_name).stat().st_size


def _has_rtx() -> bool:
    from tome_export.engine import BUILDERS

    return any(b.name == "tensorrt-rtx" and b.can_build().available for b in BUILDERS)
