"""Images of another size than the model's own: the library's own output, plans, and refusals."""

from __future__ import annotations

import pytest
import torch
from sized import MODELS
from towers import assert_plans_are_the_references, images_of

from tome_export.patch import patch
from tome_export.spec import ImageSize

CASES = [(name, size) for name, (_, sizes) in MODELS.items() for size in sizes]


def names(value):
    return "x".join(map(str, value)) if isinstance(value, tuple) else value


@pytest.mark.parametrize(("name", "size"), CASES, ids=names)
def test_r_0_is_the_librarys_at_that_size(name, size, tmp_path):
    made = MODELS[name][0](tmp_path)
    recipe = made.recipe.at(ImageSize(*size))
    assert recipe.preprocessing.input_size[1:] == size
    loaded = recipe.load(made.weights, depth=made.depth)
    merged = patch(loaded.module, 0)
    images = images_of(merged)
    with torch.no_grad():
        expected, found = made.library(size)(images), merged(images)
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= 1e-6 * expected.abs().max()
    assert_plans_are_the_references(loaded.module)
