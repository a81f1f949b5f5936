"""Where patches lie, and what the model sees."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tome_export.artifact import Manifest
from tome_export.data.preprocess import pixels_from_image
from tome_export.errors import InputError
from tome_export.models import RECIPES
from tome_export.runtime.merge_maps import grid_from_manifest, image_from_pixels
from tome_export.spec import PatchGrid

WHERE = Path("some/artifact")


@pytest.fixture(scope="module")
def built(built_artifact) -> Manifest:
    """The manifest of an artifact of vit_digits."""
    return built_artifact(check=False).manifest


def having(manifest, size, patches, grid, prefix=1):
    """A manifest of another image size and other patches."""
    first = manifest.layers[0].model_copy(update={"tokens_in": patches + prefix})
    changes = {
        "preprocessing": replace(manifest.preprocessing, input_size=(3, *size)),
        "merge": manifest.merge.model_copy(update={"prefix": prefix}),
        "layers": (first, *manifest.layers[1:]),
        "patches": grid,
    }
    return manifest.model_copy(update=changes)


@pytest.mark.parametrize(
    ("size", "patches", "grid"),
    [
        ((224, 224), 196, PatchGrid(14, 14, 16, 16)),
        ((32, 64), 32, PatchGrid(8, 4, 4, 16)),
        ((70, 70), 64, PatchGrid(8, 8, 8, 8)),  # a border of 6 pixels
    ],
)
def test_grid(built, size, patches, grid):
    assert grid_from_manifest(having(built, size, patches, grid, 5), WHERE) == grid


@pytest.mark.parametrize(
    ("size", "patches", "grid"),
    [
        ((224, 224), 196, None),
        ((224, 224), 196, PatchGrid(7, 14, 16, 16)),
        ((200, 224), 196, PatchGrid(14, 14, 16, 16)),
    ],
)
def test_grid_that_cannot_be_told(built, size, patches, grid):
    with pytest.raises(InputError) as caught:
        grid_from_manifest(having(built, size, patches, grid), WHERE)
    assert str(caught.value) == (
        f"the {patches} patches of some/artifact are not a grid over its images of {size[0]} x "
        f"{size[1]} pixels, so its tokens have no place in the image; only models that cut images "
        "into equal patches can be drawn"
    )


@pytest.mark.parametrize("recipe", ["vit_digits", "vit_b16"])
def test_what_the_model_sees_is_the_cut_image(recipe):
    preprocessing = RECIPES[recipe].preprocessing
    channels, height, width = preprocessing.input_size
    # Of the size that needs no resizing, so that the cut can be said here.
    short = (int(height / preprocessing.crop_pct), int(width / preprocessing.crop_pct))
    content = np.random.default_rng(0).integers(0, 256, (*short, 3)).astype(np.uint8)
    given = Image.fromarray(content).convert("L" if channels == 1 else "RGB")
    top, left = round((short[0] - height) / 2), round((short[1] - width) / 2)
    cut = given.convert("RGB").crop((left, top, left + width, top + height))
    found = image_from_pixels(pixels_from_image(given, preprocessing), preprocessing)
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found, np.asarray(cut))
