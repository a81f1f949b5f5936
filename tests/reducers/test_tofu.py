"""Token Fusion: ToMe's plans, pruned in early layers and MLERP in late ones."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reducers import (
    assert_holds,
    digit_images,
    digit_model,
    options_of,
    plain,
    random_layer,
    steps,
)
from references import tofu as reference

from tome_export.errors import InputError
from tome_export.patch import patch
from tome_export.reducers import reducer_from_text
from tome_export.reducers.tofu import ToFu

QUICK = settings(max_examples=40, deadline=None, derandomize=True)
SCHEDULE = [9, 0, 0, 9, 8]


@pytest.mark.parametrize("prune", [0.5, 0.0, 1.0])
def test_tokens_are_the_references(prune):
    for step in steps(digit_model(ToFu(prune), SCHEDULE), digit_images(3)):
        for image in range(3):
            rows, size = reference.tokens(plain(step.layer, image), prune)
            torch.testing.assert_close(step.x[image], torch.tensor(rows), rtol=1e-5, atol=1e-6)
            assert step.size[image].tolist() == size


@QUICK
@given(
    st.integers(2, 24),
    st.integers(0, 4),
    st.integers(1, 12),
    st.integers(0, 2**31),
    st.booleans(),
    st.integers(0, 3),
)
def test_what_always_holds(patches, prefix, r, seed, duplicates, index):
    tokens = patches + prefix
    reducer = ToFu()
    r = min(r, reducer.limit(tokens, prefix))
    layer = random_layer(tokens, r, prefix, seed=seed, duplicates=duplicates, index=index)
    x, size = assert_holds(reducer, layer)
    torch.testing.assert_close(size.sum(1), layer.size.sum(1))
    plan = reducer.decide(layer).plan
    norm, before = x.norm(dim=-1), layer.x.norm(dim=-1)
    for image in range(len(x)):
        for place, token in enumerate(plan.keep[image].tolist()):
            members = [token, *plan.src[image][plan.dst[image] == place].tolist()]
            if index < 2 or len(members) == 1:
                assert torch.equal(x[image, place], layer.x[image, token])
            else:
                torch.testing.assert_close(norm[image, place], before[image, members].max())


def test_opposite_tokens_leave_a_finite_one():
    """Their mean has no direction."""
    layer = random_layer(4, 1, 0, batch=1, index=3)
    layer.x[0, 1::2] = -layer.x[0, :1]
    layer.x[0, ::2] = layer.x[0, :1]
    assert_holds(ToFu(), layer)


def test_half_precision_does_not_overflow():
    layer = random_layer(9, 3, 1, index=3)
    large = replace(layer, x=(layer.x * 3e3).half())
    x, _ = assert_holds(ToFu(), large)
    assert x.norm(dim=-1, dtype=torch.float32).max() > 5e3


def test_proportional_attention_is_off_unless_asked_for(make_vit):
    assert ToFu.prop_attn is False  # the command line's default
    images = torch.zeros(1, 3, 64, 64)
    with torch.no_grad():
        on, off = (
            patch(make_vit(), SCHEDULE, reducer=ToFu(), prop_attn=flag)(images)
            for flag in (True, False)
        )
    assert not torch.equal(on, off)


def test_options():
    assert options_of(reducer_from_text("tofu", ["prune=0.25"])) == {"prune": 0.25}
    with pytest.raises(InputError) as caught:
        reducer_from_text("tofu", ["prune=1.5"])
    assert str(caught.value) == "prune of reducer tofu is 1.5; expected 0 to 1"
