"""A fixed random partition: plans are the reference's, here and in the exported graph."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reducers import (
    assert_engine_builds,
    assert_holds,
    assert_macs,
    assert_nothing_lost,
    assert_parity,
    assert_plans,
    assert_plans_are_the_references,
    digit_images,
    digit_model,
    options_of,
    random_layer,
    steps,
)
from references.sets import drawn

from tome_export.reducers import reducer_from_text
from tome_export.reducers.random_partition import RandomPartition

QUICK = settings(max_examples=40, deadline=None, derandomize=True)


def test_plans_are_the_references(tmp_path):
    model = digit_model(RandomPartition(), [17, 0, 20, 1000])
    assert [layer.r for layer in model.layers] == [17, 0, 20, 26, 0, 0]
    assert_plans_are_the_references(model, drawn, tmp_path)
    assert_parity(model, tmp_path, "fp32")
    assert_engine_builds(model, tmp_path, "fp32")


def test_parity_and_engine_in_fp16(tmp_path):
    model = digit_model(RandomPartition(), [7, 20])
    assert_parity(model, tmp_path, "fp16")
    assert_engine_builds(model, tmp_path, "fp16")


def test_the_option_reaches_the_plan():
    images = digit_images(2)
    given, default = (
        steps(digit_model(one, [7, 5]), images) for one in (RandomPartition(7), RandomPartition())
    )
    assert not torch.equal(given[0].plan.src, default[0].plan.src)
    for step in given:
        assert_plans(step.plan, step.layer, lambda one: drawn(one, 7))


@QUICK
@given(
    st.integers(4, 26), st.integers(0, 4), st.integers(1, 26), st.integers(0, 2**31), st.booleans()
)
def test_what_always_holds(patches, prefix, r, seed, duplicates):
    tokens = patches + prefix
    reducer = RandomPartition()
    r = min(r, reducer.limit(tokens, prefix))
    layer = random_layer(tokens, r, prefix, seed=seed, duplicates=duplicates, batch=3)
    x, size = assert_holds(reducer, layer)
    assert_nothing_lost(layer, x, size)
    if duplicates:  # of equal cosines the reference's rounding decides otherwise
        return
    assert_plans(reducer.decide(layer).plan, layer, drawn)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_keys_that_are_no_numbers_give_a_plan(bad):
    layer = random_layer(9, 3, 1)
    layer.attention.keys[0, 0, 3] = bad
    assert_holds(RandomPartition(), layer)


def test_every_layer_draws_anew_and_every_image_alike():
    layer = random_layer(33, 10, 1, batch=4)
    plans = [RandomPartition().decide(random_layer(33, 10, 1, index=n)).plan for n in (0, 1)]
    assert set(plans[0].src[0].tolist()) != set(plans[1].src[0].tolist())
    sources = {frozenset(row) for row in RandomPartition().decide(layer).plan.src.tolist()}
    assert len(sources) == 1


def test_the_draw_is_the_same_for_ever():
    # Python keeps random() as it is; an artifact's PyTorch reference relies on that.
    assert RandomPartition().sets(8, 0, 3) == ([0, 3, 7], [1, 2, 4, 5, 6])


def test_macs_and_no_merging():
    assert [layer.r for layer in digit_model(RandomPartition(), 1000).layers][:2] == [63, 0]
    assert digit_model(RandomPartition(), 0).merges is False
    assert_macs(digit_model(RandomPartition(), 7))


def test_options():
    assert options_of(reducer_from_text("random", ["seed=5"])) == {"seed": 5}
