"""TopK: the least attended tokens are dropped."""

from __future__ import annotations

import pytest
import torch
from reducers import (
    digit_images,
    digit_model,
    options_of,
    steps,
)

from tome_export.errors import InputError
from tome_export.reducers import reducer_from_text
from tome_export.reducers.topk import TopK


def test_tokens_that_stay_are_untouched():
    for step in steps(digit_model(TopK(), 7), digit_images(2)):
        for image in range(2):
            keep = step.plan.keep[image].tolist()
            assert torch.equal(step.x[image], step.layer.x[image, keep])
            assert torch.equal(step.size[image], step.layer.size[image, keep])


def test_dense_outputs_are_refused():
    from tome_export.models import RECIPES
    from tome_export.patch import patch

    with pytest.raises(InputError, match="reducer topk drops tokens"):
        patch(RECIPES["vit_digits"].load().module, None, reducer=TopK(), dense=True)


def test_options():
    assert options_of(reducer_from_text("topk", ["at=2,4"])) == {"keep": (0.7,), "at": (2, 4)}
