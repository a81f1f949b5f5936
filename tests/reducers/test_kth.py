"""Every k-th patch takes in others: plans are the reference's, here and in the exported graph."""

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
from references.sets import kth

from tome_export.errors import InputError
from tome_export.reducers import reducer_from_text
from tome_export.reducers.kth import Kth

QUICK = settings(max_examples=40, deadline=None, derandomize=True)


def test_plans_are_the_references(tmp_path):
    model = digit_model(Kth(), [17, 0, 20, 1000])
    assert [layer.r for layer in model.layers] == [17, 0, 20, 21, 0, 0]
    assert_plans_are_the_references(model, kth, tmp_path)
    assert_parity(model, tmp_path, "fp32")
    assert_engine_builds(model, tmp_path, "fp32")


def test_parity_and_engine_in_fp16(tmp_path):
    model = digit_model(Kth(), [7, 20])
    assert_parity(model, tmp_path, "fp16")
    assert_engine_builds(model, tmp_path, "fp16")


def test_the_option_reaches_the_plan():
    images = digit_images(2)
    given, default = (steps(digit_model(one, [7, 5]), images) for one in (Kth(2), Kth()))
    assert not torch.equal(given[0].plan.src, default[0].plan.src)
    for step in given:
        assert_plans(step.plan, step.layer, lambda one: kth(one, 2))


@QUICK
@given(
    st.integers(4, 26), st.integers(0, 4), st.integers(1, 26), st.integers(0, 2**31), st.booleans()
)
def test_what_always_holds(patches, prefix, r, seed, duplicates):
    tokens = patches + prefix
    reducer = Kth()
    r = min(r, reducer.limit(tokens, prefix))
    layer = random_layer(tokens, r, prefix, seed=seed, duplicates=duplicates, batch=3)
    x, size = assert_holds(reducer, layer)
    assert_nothing_lost(layer, x, size)
    if duplicates:  # of equal cosines the reference's rounding decides otherwise
        return
    assert_plans(reducer.decide(layer).plan, layer, kth)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_keys_that_are_no_numbers_give_a_plan(bad):
    layer = random_layer(9, 3, 1)
    layer.attention.keys[0, 0, 3] = bad
    assert_holds(Kth(), layer)


def test_a_tie_goes_to_the_lowest_position():
    layer = random_layer(10, 3, 1)
    layer.attention.keys.fill_(1.0)
    keep, src, dst = (part[0].tolist() for part in Kth().decide(layer).plan)
    assert (keep, src, dst) == ([0, 4, 5, 6, 7, 8, 9], [1, 2, 3], [1, 1, 1])


@pytest.mark.parametrize(
    ("patches", "k", "most"), [(64, 4, 48), (66, 4, 50), (3, 4, 0), (4, 4, 3), (65, 2, 33)]
)
def test_limit_leaves_what_the_official_code_says_it_leaves(patches, k, most):
    assert Kth(k).limit(patches + 1, 1) == most
    assert most == 0 or patches - most == patches // k


def test_macs_and_no_merging():
    assert digit_model(Kth(), 0).merges is False
    assert_macs(digit_model(Kth(), 7))


def test_options():
    assert options_of(reducer_from_text("kth", ["k=3"])) == {"k": 3}
    with pytest.raises(InputError) as caught:
        reducer_from_text("kth", ["k=1"])
    assert str(caught.value) == "k of reducer kth is 1; expected 2 or more"
