"""Against the official implementation's own answers; see tests/data/official/README.md."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from tome_export.merge.ops import match, merge
from tome_export.merge.plan import source_map, token_map
from tome_export.merge.spec import clamp_r
from tome_export.patch import patch

FOLDER = Path(__file__).parents[1] / "data" / "official"


def load_make():
    spec = importlib.util.spec_from_file_location("official_make", FOLDER / "make.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


make = load_make()
OPERATORS = json.loads((FOLDER / "operators.json").read_text())
MODELS = json.loads((FOLDER / "models.json").read_text())


@pytest.mark.parametrize("row", OPERATORS, ids=lambda row: "-".join(map(str, row["case"])))
def test_operators(row):
    tokens, wanted, class_token, distill_token = row["case"]
    metric, x, size = (torch.from_numpy(p) for p in make.operator_inputs(tuple(row["case"])))
    prefix = class_token + distill_token
    plan = match(metric, clamp_r(tokens, wanted, prefix), prefix, class_token)
    merged, sizes = merge(x, size.float(), plan)
    assert token_map(plan).tolist() == row["position"]
    assert sizes.int().tolist() == row["size"]
    np.testing.assert_allclose(merged.numpy(), row["x"], rtol=0, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize(
    "row", MODELS, ids=lambda r: f"{r['model']}-{r['schedule']}-{r['prop_attn']}"
)
def test_models(row, dtype):
    name, kwargs = make.MODELS[row["model"]]
    model = make.small_vit(name, **kwargs).to(dtype)
    schedule = row["schedule"]
    if schedule in ([9, -1.0], [9, 1.0]):  # JSON knows no tuples
        schedule = tuple(schedule)
    merged = patch(model, schedule, prop_attn=row["prop_attn"])
    images = torch.from_numpy(make.images(kwargs["img_size"])).to(dtype)
    with torch.no_grad():
        output, trace = merged.forward_traced(images)
    if row["position"] is not None:
        mapping = source_map([step.plan for step in trace], len(images), merged.layers[0].tokens_in)
        assert mapping.tolist() == row["position"]
    # Average pooling is weighted by size here and not there: only decisions can be compared.
    if model.global_pool == "token" or not merged.merges:
        expected = np.array(row["output"])
        error = np.abs(output.double().numpy() - expected).max() / np.abs(expected).max()
        # log(size) is fp32 in every precision.
        assert error <= (1e-7 if dtype == torch.float64 else 1e-5)


def test_the_records_cover_what_they_claim():
    assert {tuple(row["case"]) for row in OPERATORS} == set(make.OPERATORS)
    schedules = {str(list(s) if isinstance(s, tuple) else s) for s in make.SCHEDULES}
    for label in make.MODELS:
        assert {str(r["schedule"]) for r in MODELS if r["model"] == label} == schedules
