"""A fixed random partition: plans are the reference's, here and in the exported graph."""

from __future__ import annotations

import torch
from reducers import (
    assert_plans,
    digit_images,
    digit_model,
    random_layer,
    steps,
)
from references.sets import drawn

from tome_export.reducers.random_partition import RandomPartition


def test_the_option_reaches_the_plan():
    images = digit_images(2)
    given, default = (
        steps(digit_model(one, [7, 5]), images) for one in (RandomPartition(7), RandomPartition())
    )
    assert not torch.equal(given[0].plan.src, default[0].plan.src)
    for step in given:
        assert_plans(step.plan, step.layer, lambda one: drawn(one, 7))


def test_every_layer_draws_anew_and_every_image_alike():
    layer = random_layer(33, 10, 1, batch=4)
    plans = [RandomPartition().decide(random_layer(33, 10, 1, index=n)).plan for n in (0, 1)]
    assert set(plans[0].src[0].tolist()) != set(plans[1].src[0].tolist())
    sources = {frozenset(row) for row in RandomPartition().decide(layer).plan.src.tolist()}
    assert len(sources) == 1


def test_the_draw_is_the_same_for_ever():
    # Python keeps random() as it is; an artifact's PyTorch reference relies on that.
    assert RandomPartition().sets(8, 0, 3) == ([0, 3, 7], [1, 2, 4, 5, 6])
