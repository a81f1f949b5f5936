"""Sizes that follow from a model's name are those of the model itself."""

from __future__ import annotations

import pytest

from tome_export.errors import InputError
from tome_export.models import RECIPES
from tome_export.pipeline.catalog import catalog, details, sizes_from_model, sizes_from_name


@pytest.mark.parametrize("name", RECIPES)
def test_sizes_from_the_name_are_those_of_the_model(name):
    recipe = RECIPES[name]
    assert sizes_from_name(recipe) == sizes_from_model(recipe)


def test_a_name_without_its_sizes_is_not_guessed():
    from dataclasses import replace

    with pytest.raises(ValueError, match="does not follow"):
        sizes_from_name(replace(RECIPES["vit_b16"], timm_name="vit_giant_patch14_clip_224"))


def test_catalog_and_details_agree():
    for row in catalog():
        found = details(row["name"])
        assert {key: found[key] for key in row} == row


def test_a_model_that_cannot_be_patched_is_refused():
    with pytest.raises(InputError):
        details("timm:resnet18")
