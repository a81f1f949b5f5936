"""Query: what is irrelevant to the second input goes."""

from __future__ import annotations

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reducers import (
    assert_engine_builds,
    assert_holds,
    assert_macs,
    assert_parity,
    assert_plans,
    assert_plans_are_the_references,
    digit_images,
    digit_model,
    options_of,
    random_layer,
    steps,
)
from references import query as reference
from safetensors.torch import save_file

from tome_export.errors import InputError
from tome_export.patch import patch
from tome_export.reducers import reducer_from_text
from tome_export.reducers.query import Query

QUICK = settings(max_examples=40, deadline=None, derandomize=True)


def projection(width=24, bias=True):
    generator = torch.Generator().manual_seed(3)
    state = {"weight": torch.randn(width, 64, generator=generator)}
    return {**state, "bias": torch.randn(width, generator=generator)} if bias else state


def reference_of(model):
    merge = model.settings.reducer.mode == "merge"
    state = {} if model.reducer is None else model.reducer.state_dict()
    lists = {key: value.tolist() for key, value in state.items()}
    return lambda layer: reference.plan(layer, **lists, merge=merge)


@pytest.mark.parametrize("options", [{}, {"weights": "random", "width": 24, "mode": "merge"}])
def test_plans_are_the_references(tmp_path, options):
    model = digit_model(Query(**options), [7, 0, 33, 2])
    assert_plans_are_the_references(model, reference_of(model), tmp_path)


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


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_parity(tmp_path, precision):
    reducer = Query(weights="random", width=24, mode="merge" if precision == "fp32" else "drop")
    assert_parity(digit_model(reducer, 8), tmp_path, precision)


@QUICK
@given(
    st.integers(2, 24),
    st.integers(0, 4),
    st.integers(1, 12),
    st.integers(0, 2**31),
    st.booleans(),
    st.sampled_from(["drop", "merge"]),
)
def test_what_always_holds(patches, prefix, r, seed, duplicates, mode):
    tokens, reducer = patches + prefix, Query(mode=mode)
    r = min(r, reducer.limit(tokens, prefix))
    query = torch.randn(3, 16, generator=torch.Generator().manual_seed(seed))
    layer = random_layer(tokens, r, prefix, 3, seed, duplicates=duplicates, inputs={"query": query})
    _, size = assert_holds(reducer, layer)
    if mode == "merge":
        torch.testing.assert_close(size.sum(1), layer.size.sum(1))
    plan = reducer.decide(layer).plan
    if not duplicates:  # the reference's rounding decides ties otherwise
        assert_plans(plan, layer, lambda one: reference.plan(one, merge=mode == "merge"))


def test_ties_go_to_the_lowest_position():
    layer = random_layer(7, 2, 2, inputs={"query": torch.zeros(2, 16)})
    alike = layer.attention._replace(keys=torch.ones_like(layer.attention.keys))
    object.__setattr__(layer, "attention", alike)
    for mode, dst in (("drop", [-1, -1]), ("merge", [2, 2])):
        plan = Query(mode=mode).decide(layer).plan
        assert [part[0].tolist() for part in plan] == [[0, 1, 2, 3, 4], [5, 6], dst]


def test_r_is_clamped_and_counted():
    assert [layer.r for layer in digit_model(Query(), 1000).layers] == [63, 0, 0, 0, 0, 0]
    unmerged = digit_model(Query(), 0)
    assert not unmerged.merges
    assert unmerged.extra_inputs == {}
    assert_macs(digit_model(Query(weights="random", width=24), 6))


def test_any_prefix(make_vit, make_images):
    vit = make_vit("test_vit", class_token=False, reg_tokens=3, global_pool="avg")
    model = patch(vit, 5, reducer=Query(mode="merge"))
    assert model.settings.prop_attn
    assert not patch(vit, 5, reducer=Query()).settings.prop_attn
    for step in steps(model, make_images(model, 2)):
        assert_plans(step.plan, step.layer, lambda one: reference.plan(one, merge=True))


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


def test_engine_builds(tmp_path):
    reducer = Query(weights="random", width=24, mode="merge")
    assert_engine_builds(digit_model(reducer, 8), tmp_path)
