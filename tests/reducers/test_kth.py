"""Every k-th patch takes in others: plans are the reference's, here and in the exported graph."""

from __future__ import annotations

import pytest
import torch
from reducers import (
    assert_plans,
    digit_images,
    digit_model,
    options_of,
    steps,
)
from references.sets import kth

from tome_export.errors import InputError
from tome_export.reducers import reducer_from_text
from tome_export.reducers.kth import Kth


def test_the_option_reaches_the_plan():
    images = digit_images(2)
    given, default = (steps(digit_model(one, [7, 5]), images) for one in (Kth(2), Kth()))
    assert not torch.equal(given[0].plan.src, default[0].plan.src)
    for step in given:
        assert_plans(step.plan, step.layer, lambda one: kth(one, 2))


@pytest.mark.parametrize(
    ("patches", "k", "most"), [(64, 4, 48), (66, 4, 50), (3, 4, 0), (4, 4, 3), (65, 2, 33)]
)
def test_limit_leaves_what_the_official_code_says_it_leaves(patches, k, most):
    assert Kth(k).limit(patches + 1, 1) == most
    assert most == 0 or patches - most == patches // k


def test_options():
    assert options_of(reducer_from_text("kth", ["k=3"])) == {"k": 3}
    with pytest.raises(InputError) as caught:
        reducer_from_text("kth", ["k=1"])
    assert str(caught.value) == "k of reducer kth is 1; expected 2 or more"
