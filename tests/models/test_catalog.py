"""Sizes that a recipe states are those of the model itself."""

from __future__ import annotations

import pytest

from tome_export.errors import InputError
from tome_export.models import RECIPES
from tome_export.models.catalog import catalog, details, sizes_from_geometry, sizes_from_model


@pytest.mark.parametrize("name", RECIPES)
def test_sizes_of_the_recipe_are_those_of_the_model(name):
    recipe = RECIPES[name]
    assert sizes_from_geometry(recipe) == sizes_from_model(recipe)


def test_catalog_and_details_agree():
    for row in catalog():
        assert row == details(row.name)


def test_a_model_that_cannot_be_patched_is_refused():
    with pytest.raises(InputError):
        details("timm:resnet18")
