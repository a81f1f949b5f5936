"""TopK: the least attended tokens are dropped."""

from __future__ import annotations

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
from references import evit as reference

from tome_export.errors import InputError
from tome_export.reducers import reducer_from_text
from tome_export.reducers.topk import TopK

QUICK = settings(max_examples=40, deadline=None, derandomize=True)


@pytest.mark.parametrize("r", [None, [0, 0, 9, 0, 1, 45]])
def test_plans_are_the_references(tmp_path, r):
    assert_plans_are_the_references(digit_model(TopK(), r), reference.topk, tmp_path)


def test_tokens_that_stay_are_untouched():
    for step in steps(digit_model(TopK(), 7), digit_images(2)):
        for image in range(2):
            keep = step.plan.keep[image].tolist()
            assert torch.equal(step.x[image], step.layer.x[image, keep])
            assert torch.equal(step.size[image], step.layer.size[image, keep])


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_parity(tmp_path, precision):
    assert_parity(digit_model(TopK(), None), tmp_path, precision)


@QUICK
@given(
    st.integers(2, 24), st.integers(1, 4), st.integers(1, 12), st.integers(0, 2**31), st.booleans()
)
def test_what_always_holds(patches, prefix, r, seed, duplicates):
    tokens = patches + prefix
    r = min(r, TopK().limit(tokens, prefix))
    layer = random_layer(tokens, r, prefix, batch=3, seed=seed, duplicates=duplicates)
    assert_holds(TopK(), layer)
    plan = TopK().decide(layer).plan
    assert (plan.dst == -1).all()
    if not duplicates:  # the reference's rounding decides ties otherwise
        assert_plans(plan, layer, reference.topk)


def test_ties_go_to_the_lowest_position():
    layer = random_layer(7, 2, 2)
    alike = layer.attention._replace(keys=torch.ones_like(layer.attention.keys))
    object.__setattr__(layer, "attention", alike)
    plan = TopK().decide(layer).plan
    assert [part[0].tolist() for part in plan] == [[0, 1, 2, 3, 4], [5, 6], [-1, -1]]


def test_attention_that_is_no_number_counts_as_none():
    layer = random_layer(7, 2, 1)
    layer.attention.keys[0, 0, 3] = torch.nan
    assert_holds(TopK(), layer)


def test_r_is_clamped_and_counted():
    assert [layer.r for layer in digit_model(TopK(), 1000).layers] == [63, 0, 0, 0, 0, 0]
    assert not digit_model(TopK(), 0).merges
    assert_macs(digit_model(TopK(), None))


def test_dense_outputs_are_refused():
    from tome_export.models import RECIPES
    from tome_export.patch import patch

    with pytest.raises(InputError, match="reducer topk drops tokens"):
        patch(RECIPES["vit_digits"].load().module, None, reducer=TopK(), dense=True)


def test_engine_builds(tmp_path):
    assert_engine_builds(digit_model(TopK(), None), tmp_path)


def test_options():
    assert options_of(reducer_from_text("topk", ["at=2,4"])) == {"keep": (0.7,), "at": (2, 4)}
