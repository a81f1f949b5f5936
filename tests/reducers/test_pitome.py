"""PiToMe: its plans are the paper's, in PyTorch and in the exported graph."""

from __future__ import annotations

import numpy as np
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
from references import pitome as reference

from tome_export.errors import InputError
from tome_export.patch import patch
from tome_export.reducers import reducer_from_text
from tome_export.reducers.pitome import PiToMe

QUICK = settings(max_examples=40, deadline=None, derandomize=True)


def test_plans_are_the_references(tmp_path):
    model = digit_model(PiToMe(), [7, 0, 29, 1000])
    assert [layer.r for layer in model.layers] == [7, 0, 28, 14, 0, 0]
    assert_plans_are_the_references(model, reference.plan, tmp_path)
    assert_parity(model, tmp_path, "fp32")
    assert_engine_builds(model, tmp_path, "fp32")


def test_parity_and_engine_in_fp16(tmp_path):
    model = digit_model(PiToMe(), [7, 7])
    assert_parity(model, tmp_path, "fp16")
    assert_engine_builds(model, tmp_path, "fp16")


@pytest.mark.parametrize("split", ["deit", "mae"])
def test_plans_of_the_authors_split_are_the_references(tmp_path, split):
    model = digit_model(PiToMe(0.75, split=split), [7, 9, 5, 6, 4, 8])
    assert_plans_are_the_references(
        model, lambda one: reference.plan(one, 0.75, split=split), tmp_path
    )
    assert_parity(model, tmp_path, "fp32")


def test_the_split_takes_half_of_the_patches_in_half_of_the_layers():
    """Set A has half of the patches there, so that the most similar pairs of all can merge."""
    layer = random_layer(13, 2, 1, depth=5, index=0)
    for split, layers in (("none", []), ("deit", [0, 1, 2]), ("mae", [3, 4])):
        assert [n for n in range(5) if PiToMe(split=split).splits(n, 5)] == layers
    whole, part = (PiToMe(split=split).decide(layer).plan for split in ("deit", "none"))
    assert not torch.equal(whole.src, part.src)


def test_attention_is_not_proportional_unless_asked_for(make_vit, make_images):
    """The vision models of the authors' code run without sizes."""
    vit = make_vit()
    own, on, off = (patch(vit, 5, reducer=PiToMe(), prop_attn=flag) for flag in (None, True, False))
    images = torch.from_numpy(make_images(own, 2))
    with torch.no_grad():
        assert torch.equal(own(images), off(images))
        assert not torch.equal(own(images), on(images))


def test_options_reach_the_plan():
    images = digit_images(2)
    given, default = (
        steps(digit_model(one, [7]), images)[0] for one in (PiToMe(0.4, 0.2), PiToMe())
    )
    assert not torch.equal(given.plan.src, default.plan.src)
    assert_plans(given.plan, given.layer, lambda one: reference.plan(one, 0.4, 0.2))


@QUICK
@given(
    st.integers(3, 24),
    st.integers(0, 4),
    st.integers(1, 12),
    st.integers(0, 2**31),
    st.booleans(),
    st.sampled_from(["none", "deit", "mae"]),
)
def test_what_always_holds(patches, prefix, r, seed, duplicates, split):
    tokens = patches + prefix
    reducer = PiToMe(split=split)
    r = min(r, reducer.limit(tokens, prefix))
    layer = random_layer(
        tokens, r, prefix, seed=seed, duplicates=duplicates, batch=3, index=seed % 4
    )
    x, size = assert_holds(reducer, layer)
    assert_nothing_lost(layer, x, size)
    if duplicates:  # of equal energies the reference's rounding decides otherwise
        return
    assert_plans(reducer.decide(layer).plan, layer, lambda one: reference.plan(one, split=split))


def test_a_tie_goes_to_the_lowest_position():
    layer = random_layer(9, 2, 1)
    layer.attention.keys.fill_(1.0)
    keep, src, dst = (part[0].tolist() for part in PiToMe().decide(layer).plan)
    assert (keep, src, dst) == ([0, 2, 4, 5, 6, 7, 8], [1, 3], [1, 1])


def test_unusual_tokens_are_protected():
    """A cluster merges; what is like nothing else stays."""
    rng = np.random.default_rng(0)
    layer = random_layer(14, 3, 1, batch=1)
    keys = rng.standard_normal((1, 2, 14, 16), dtype=np.float32)
    cluster = [2, 4, 5, 8, 10, 11, 13]
    keys[:, :, cluster] = keys[:, :, 1:2] + 0.01 * keys[:, :, cluster]
    layer.attention.keys.copy_(torch.from_numpy(keys))
    plan = PiToMe().decide(layer).plan
    assert {*plan.src[0].tolist(), *plan.keep[0, plan.dst[0].long()].tolist()} <= {1, *cluster}


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_keys_that_are_no_numbers_give_a_plan(bad):
    layer = random_layer(9, 3, 1)
    layer.attention.keys[0, 0, 3] = bad
    assert_holds(PiToMe(), layer)


def test_r_is_clamped_to_half_of_the_patches():
    model = digit_model(PiToMe(), 1000)
    assert [layer.r for layer in model.layers][:3] == [32, 16, 8]
    assert digit_model(PiToMe(), 0).merges is False
    assert_macs(digit_model(PiToMe(), 7))


@pytest.mark.parametrize(
    "kwargs", [{"class_token": False, "global_pool": "avg"}, {"reg_tokens": 3}]
)
def test_any_prefix(make_vit, make_images, kwargs):
    model = patch(make_vit("test_vit", **kwargs), 5, reducer=PiToMe())
    images = make_images(model, 2)
    for step in steps(model, images):
        assert_plans(step.plan, step.layer, reference.plan)


def test_options():
    assert options_of(reducer_from_text("pitome", ["margin=0.75", "split=deit"])) == {
        "margin": 0.75,
        "alpha": 1,
        "split": "deit",
    }


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("margin=-1", "margin of reducer pitome is -1; expected 0 or more"),
        ("alpha=nan", "alpha of reducer pitome is nan; expected 0 or more"),
        ("split=half", "split of reducer pitome is 'half'; expected none, deit, mae"),
    ],
)
def test_bad_options(option, message):
    with pytest.raises(InputError) as caught:
        reducer_from_text("pitome", [option])
    assert str(caught.value) == message
