"""Query: what is irrelevant to the second input goes."""

from __future__ import annotations

import re

import pytest
import torch
from reducers import (
    assert_plans,
    digit_images,
    digit_model,
    options_of,
    steps,
)
from references import query as reference
from safetensors.torch import save_file

from tome_export.errors import InputError
from tome_export.patch import patch
from tome_export.reducers import reducer_from_text
from tome_export.reducers.query import Query


def projection(width=24, bias=True):
    generator = torch.Generator().manual_seed(3)
    state = {"weight": torch.randn(width, 64, generator=generator)}
    return {**state, "bias": torch.randn(width, generator=generator)} if bias else state


def reference_of(model):
    merge = model.settings.reducer.mode == "merge"
    state = {} if model.reducer is None else model.reducer.state_dict()
    lists = {key: value.tolist() for key, value in state.items()}
    return lambda layer: reference.plan(layer, **lists, merge=merge)


@pytest.mark.parametrize("bias", [True, False])
def test_the_projection_is_the_files(tmp_path, bias):
    state, file = projection(bias=bias), tmp_path / "w.safetensors"
    save_file(state, file)
    reducer = reducer_from_text("query", [f"weights={file}", "width=24"])
    assert options_of(reducer) == {"weights": str(file), "width": 24, "mode": "drop"}
    model = digit_model(reducer, 9)
    assert {f"reducer.{key}" for key in state} <= model.state_dict().keys()
    expected = reference_of(model)
    for step in steps(model, digit_images(2)):
        assert_plans(step.plan, step.layer, expected)


def test_another_query_leaves_other_tokens():
    model, images = digit_model(Query(), [40]), torch.from_numpy(digit_images(2))
    query = torch.linspace(-1, 1, 64).expand(2, -1)
    kept = []
    for one in (query, -query):
        _, trace = model.forward_traced(images, inputs={"query": one})
        kept.append({*trace[0].plan.keep[0].tolist()})
    assert not kept[0] <= kept[1]
    with torch.no_grad():
        assert not torch.allclose(model(images, query), model(images, -query))


def test_only_merging_has_dense_outputs(make_vit):
    assert patch(make_vit("test_vit"), 5, reducer=Query(mode="merge"), dense=True).settings.dense
    with pytest.raises(InputError, match="reducer query drops tokens"):
        patch(make_vit("test_vit"), 5, reducer=Query(), dense=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["mode=fuse"], "option mode of reducer query is 'fuse'; expected drop or merge"),
        (["width=-1"], "option width of reducer query is -1; expected 0 or more"),
        (["width=24"], "option width of reducer query is 24 and the model's tokens are 64 wide; "
         "give a projection with --reducer-option weights=FILE"),
        (["weights={file}"], "weights file {file} does not fit reducer query on this model: bias "
         "is [24]; expected [64]"),
        (["weights={file}", "width=12"], "weights file {file} does not fit reducer query on this "
         "model: bias is [24]; expected [12]"),
    ],
)  # fmt: skip
def test_bad_options(tmp_path, options, message):
    file = tmp_path / "w.safetensors"
    save_file(projection(), file)
    with pytest.raises(InputError, match=f"^{re.escape(message.format(file=file))}$"):
        digit_model(reducer_from_text("query", [o.format(file=file) for o in options]), 4)
