"""PiToMe: its plans are the paper's, in PyTorch and in the exported graph."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from reducers import (
    assert_plans,
    digit_images,
    digit_model,
    random_layer,
    steps,
)
from references import pitome as reference

from tome_export.errors import InputError
from tome_export.patch import patch
from tome_export.reducers import reducer_from_text
from tome_export.reducers.pitome import PiToMe


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
