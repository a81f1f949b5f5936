"""What every reducer must show. A new one needs a line in ``CASES`` and a reference of its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reducers import (
    BATCH,
    Plan,
    Reference,
    assert_engine_builds,
    assert_holds,
    assert_is_plan,
    assert_macs,
    assert_nothing_lost,
    assert_parity,
    assert_plans,
    assert_plans_are_the_references,
    digit_images,
    digit_model,
    exported,
    options_of,
    random_layer,
    steps,
)
from references import diffrate, dtem, dynamicvit, evit, pitome, query, sets, tofu

from tome_export.engine import select
from tome_export.errors import InputError
from tome_export.onnx.export import ExportOptions, onnx_from_model
from tome_export.parity.compare import inputs_of
from tome_export.patch import patch
from tome_export.reducers import REDUCERS, reducer_from_text
from tome_export.reducers.base import ModelShape, Reducer
from tome_export.runtime.ort import OrtRunner

WIDTH, DEPTH = 16, 4
"""Of random layers."""

State = dict[str, list]
DROPPED = ([0, 1, 2, 3, 4, 5, 6], [7, 8], [-1, -1])
MATCHED = ([0, 6, 8, 1, 3, 5, 7], [2, 4], [3, 3])


class Case(NamedTuple):
    """A reducer and what is expected of it.

    Attributes:
        options: As the command line has them.
        reference: Gives the reference of one image, from the learned weights and the depth.
        schedule: For vit_digits, which has a class token and 64 patches; None for its own counts.
        removed: Tokens that the schedule removes in each layer; None if another test says so.
        limit: The most tokens that the first layer of vit_digits can remove.
        tie: Plan of nine equal tokens, the first of them a class token, with r = 2.
        keeps: What is the same before and after: ``means`` (sizes and the mean weighted by them),
            ``sizes``, or ``some`` (sizes get less).
        last: Highest index of a block of ``DEPTH`` that can remove tokens.
    """

    options: tuple[str, ...]
    reference: Callable[[State, int], Reference]
    schedule: Any
    removed: list[int] | None
    limit: int
    tie: Plan
    keeps: str = "means"
    last: int = DEPTH - 1


def quarters(depth: int) -> tuple[int, ...]:
    return tuple(sorted({quarter * depth // 4 for quarter in (1, 2, 3)} - {0}))


def same(reference: Reference) -> Callable[[State, int], Reference]:
    """A reference that depends on no weights."""
    return lambda _state, _depth: reference


CASES = {
    "tome": Case(
        (), same(tofu.plan), [7, 0, 29, 1000], [7, 0, 28, 14, 0, 0], 32, MATCHED
    ),
    "pitome": Case(
        ("margin=0.75",),
        same(partial(pitome.plan, margin=0.75)),
        [7, 0, 29, 1000],
        [7, 0, 28, 14, 0, 0],
        32,
        ([0, 2, 4, 5, 6, 7, 8], [1, 3], [1, 1]),
    ),
    "pitome deit": Case(
        ("margin=0.9", "split=deit"),
        same(partial(pitome.plan, split="deit")),
        [7, 9, 5, 6, 4, 8],
        [7, 9, 5, 6, 4, 8],
        32,
        ([0, 2, 4, 5, 6, 7, 8], [1, 3], [1, 1]),
    ),
    "pitome mae": Case(
        ("split=mae",),
        same(partial(pitome.plan, split="mae")),
        [7, 9, 5, 6, 4, 8],
        [7, 9, 5, 6, 4, 8],
        32,
        ([0, 2, 4, 5, 6, 7, 8], [1, 3], [1, 1]),
    ),
    "tofu": Case(
        ("prune=0.25",), same(tofu.plan), [9, 0, 0, 9, 8], [9, 0, 0, 9, 8, 0], 32, MATCHED, "sizes"
    ),
    "kth": Case(
        ("k=4",),
        same(sets.kth),
        [17, 0, 20, 1000],
        [17, 0, 20, 21, 0, 0],
        48,
        ([0, 3, 4, 5, 6, 7, 8], [1, 2], [2, 2]),
    ),
    "random": Case(
        ("seed=5",),
        same(partial(sets.drawn, seed=5)),
        [17, 0, 20, 1000],
        [17, 0, 20, 26, 0, 0],
        63,
        ([0, 1, 2, 3, 4, 5, 8], [6, 7], [1, 1]),
    ),
    "dtem": Case(
        ("weights=random", "features=8"),
        lambda state, _depth: partial(dtem.plan, state=state),
        [7, 0, 0, 1000],
        [7, 0, 0, 28, 0, 0],
        32,
        MATCHED,
    ),
    "evit": Case(
        (),
        same(evit.plan),
        [0, 0, 9, 0, 1, 45],
        [0, 0, 9, 0, 1, 45],
        62,
        ([0, 1, 2, 3, 4, 5, 6], [7, 8], [6, 6]),
        "sizes",
    ),
    "evit own counts": Case((), same(evit.plan), None, None, 62, (
        [0, 1, 2, 3, 4, 5, 6], [7, 8], [6, 6]
    ), "sizes"),
    "topk": Case((), same(evit.topk), None, None, 63, DROPPED, "some"),
    "diffrate": Case(
        (),
        same(diffrate.plan),
        [6, 0, 9],
        [6, 0, 9, 0, 0, 0],
        63,
        ([0, 1, 2, 3, 4, 5, 6], [7, 8], [1, 1]),
        "some",
    ),
    "dynamicvit": Case(
        ("weights=random",),
        lambda state, depth: partial(dynamicvit.plan, state=state, stages=quarters(depth)),
        [9, 9, 9, 30],
        [9, 0, 9, 30, 0, 0],
        63,
        DROPPED,
        "some",
        last=DEPTH - 2,
    ),
    "query": Case((), same(query.plan), [7, 0, 33, 2], [7, 0, 33, 2, 0, 0], 63, DROPPED, "some"),
    "query merge": Case(
        ("weights=random", "width=24", "mode=merge"),
        lambda state, _depth: partial(query.plan, **state, merge=True),
        [7, 0, 33, 2],
        [7, 0, 33, 2, 0, 0],
        63,
        ([0, 1, 2, 3, 4, 5, 6], [7, 8], [1, 1]),
    ),
}  # fmt: skip

each_case = pytest.mark.parametrize("name", CASES)
each_reducer = pytest.mark.parametrize("name", REDUCERS)
"""One case each, where variants differ in nothing that is tested."""


def reducer_of(name: str) -> Reducer:
    return reducer_from_text(name.split()[0], CASES[name].options)


def lists_of(module: torch.nn.Module | None) -> State:
    """Weights for references."""
    return {} if module is None else {key: v.tolist() for key, v in module.state_dict().items()}


def model_of(name: str):
    """The trained vit_digits with the reducer of a case."""
    return digit_model(reducer_of(name), CASES[name].schedule)


def reference_of(name: str, model) -> Reference:
    return CASES[name].reference(lists_of(model.reducer), len(model.layers))


def layer_of(name: str, tokens: int, r: int, prefix: int, seed: int = 0, **more):
    """A random layer, with all that the reducer needs besides, and its reference."""
    reducer = reducer_of(name)
    module = reducer.module(ModelShape(WIDTH, DEPTH, tokens, prefix))
    inputs = {
        key: torch.randn(3, *shape, generator=torch.Generator().manual_seed(seed))
        for key, shape in reducer.inputs(ModelShape(WIDTH, DEPTH, tokens, prefix)).items()
    }
    layer = random_layer(
        tokens, r, prefix, 3, seed, module=module, inputs=inputs, depth=DEPTH, **more
    )
    return layer, CASES[name].reference(lists_of(module), DEPTH)


def test_every_reducer_has_a_case():
    assert {name.split()[0] for name in CASES} == set(REDUCERS)
    assert set(REDUCERS) <= set(CASES)
    for name in REDUCERS:
        assert reducer_of(name).name == name
        assert reducer_of(name).summary
        assert reducer_of(name).source


@each_case
def test_plans_are_the_references(tmp_path, name):
    """On real images, in PyTorch and in the exported graph; and the parity check agrees."""
    model = model_of(name)
    removed = CASES[name].removed
    assert removed is None or [layer.r for layer in model.layers] == removed
    assert_plans_are_the_references(model, reference_of(name, model), tmp_path, count=4)
    assert_parity(model, tmp_path, "fp32")


@each_reducer
def test_half_precision_is_explained_and_parsed(tmp_path, name):
    model = model_of(name)
    assert_parity(model, tmp_path, "fp16")
    backend = select("tensorrt-rtx").builder
    assert backend is not None
    backend.parse(tmp_path / "fp16.onnx")


@pytest.mark.slow
@each_case
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_engine_builds(tmp_path, name, precision):
    assert_engine_builds(model_of(name), tmp_path, precision)


@pytest.mark.parametrize("name", ["tofu", "pitome"])
def test_engine_of_a_match_and_of_scores_builds(tmp_path, name):
    assert_engine_builds(model_of(name), tmp_path, "fp16")


@pytest.mark.slow
@each_case
def test_lowerings_compute_the_same(tmp_path, name):
    model, images = model_of(name), digit_images(4)
    inputs = {"pixel_values": images, **inputs_of(model, len(images))}
    options = ExportOptions(batch=BATCH, lowering="index_add")
    onnx_from_model(model, tmp_path / "index_add.onnx", options, "logits")
    with (
        OrtRunner(exported(model, tmp_path)) as matmul,
        OrtRunner(tmp_path / "index_add.onnx") as index_add,
    ):
        expected, found = (run.infer(inputs)["logits"] for run in (matmul, index_add))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


@each_case
@settings(max_examples=25, deadline=None, derandomize=True)
@given(data=st.data(), seed=st.integers(0, 2**31), duplicates=st.booleans())
def test_what_always_holds(name, data, seed, duplicates):
    case, reducer = CASES[name], reducer_of(name)
    prefix = data.draw(st.integers(int(reducer.needs_class_attention), 4), "prefix")
    tokens = prefix + data.draw(st.integers(4, 24), "patches")
    r = data.draw(st.integers(1, reducer.limit(tokens, prefix)), "r")
    index = data.draw(st.integers(0, case.last), "index")
    layer, reference = layer_of(name, tokens, r, prefix, seed, index=index, duplicates=duplicates)
    with torch.no_grad():
        # The energies of duplicates are sums whose rounding depends on the batch.
        x, size = assert_holds(reducer, layer, alone=not duplicates)
        plan = reducer.decide(layer).plan
    if case.keeps == "means":
        assert_nothing_lost(layer, x, size)
    elif case.keeps == "sizes":
        torch.testing.assert_close(size.sum(1), layer.size.sum(1))
    else:
        assert (size.sum(1) <= layer.size.sum(1) + 1e-3).all()
    if not duplicates:  # the reference's rounding decides ties otherwise
        assert_plans(plan, layer, reference)


@each_case
def test_ties_go_to_the_lowest_index(name):
    layer, reference = layer_of(name, 9, 2, 1)
    equal = layer.attention._replace(
        **{part: torch.ones_like(getattr(layer.attention, part)) for part in ("keys", "queries")},
        tokens=torch.ones_like(layer.x),
    )
    layer = replace(layer, x=torch.ones_like(layer.x), attention=equal)
    with torch.no_grad():
        plan = reducer_of(name).decide(layer).plan
    assert tuple(part[0].tolist() for part in plan) == CASES[name].tie
    assert_plans(plan, layer, reference)


@each_case
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_keys_that_are_no_numbers_give_a_plan(name, bad):
    layer, _ = layer_of(name, 9, 2, 1)
    layer.attention.keys[0, 0, 3] = bad
    with torch.no_grad():
        plan = reducer_of(name).decide(layer).plan
        assert_is_plan(plan, layer.tokens, layer.prefix)
        if not name.startswith("evit"):  # whose fused token is a sum weighted by that attention
            assert_holds(reducer_of(name), layer)


@each_case
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_tokens_of_any_dtype(name, dtype):
    layer, _ = layer_of(name, 9, 2, 1)
    attention = layer.attention._replace(
        keys=layer.attention.keys.to(dtype),
        queries=layer.attention.queries.to(dtype),
        tokens=layer.attention.tokens.to(dtype),
    )
    module = None if layer.module is None else layer.module.to(dtype)
    with torch.no_grad():
        assert_holds(
            reducer_of(name),
            replace(layer, x=layer.x.to(dtype), attention=attention, module=module),
        )


@each_case
def test_r_is_clamped_and_counted(name):
    reducer = reducer_of(name)
    assert digit_model(reducer, 1000).layers[0].r == CASES[name].limit
    assert digit_model(reducer, 0).merges is False
    # Of 64 channels and as many tokens, the cosines that DiffRate compares are a large share.
    assert_macs(digit_model(reducer, 7), overhead=0.1 if name == "diffrate" else 0.02)


@each_case
@pytest.mark.parametrize(
    "kwargs", [{"reg_tokens": 3}, {"class_token": False, "reg_tokens": 3, "global_pool": "avg"}]
)
def test_any_prefix(make_vit, make_images, name, kwargs):
    reducer = reducer_of(name)
    if reducer.needs_class_attention and "class_token" in kwargs:
        with pytest.raises(InputError, match="this model has no class token; use a reducer that"):
            patch(make_vit("test_vit", **kwargs), 5, reducer=reducer)
        return
    model = patch(make_vit("test_vit", **kwargs), 5, reducer=reducer)
    for step in steps(model, make_images(model, 2)):
        assert_plans(step.plan, step.layer, reference_of(name, model))


@each_case
def test_options_are_those_of_the_manifest(name):
    found = options_of(reducer_of(name))
    for option in CASES[name].options:
        key, _, text = option.partition("=")
        assert str(found[key]) == text
