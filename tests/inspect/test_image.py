"""Where patches lie, and what the model sees."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tome_export.errors import InputError
from tome_export.inspect.image import grid_from_manifest, image_from_pixels
from tome_export.models import RECIPES
from tome_export.models.preprocess import pixels_from_image
from tome_export.spec import PatchGrid

WHERE = Path("some/artifact")


def manifest(size, patches, prefix=1, recorded=None):
    return {
        "preprocessing": {"input_size": [3, *size]},
        "merge": {"prefix": prefix},
        "tokens_in": patches + prefix,
        "patches": recorded,
    }


@pytest.mark.parametrize(
    ("size", "patches", "recorded", "expected"),
    [
        ((224, 224), 196, PatchGrid(14, 14, 16, 16), PatchGrid(14, 14, 16, 16)),
        ((32, 64), 32, PatchGrid(4, 8, 8, 8), PatchGrid(4, 8, 8, 8)),
        ((32, 64), 32, PatchGrid(8, 4, 4, 16), PatchGrid(8, 4, 4, 16)),
        ((70, 70), 64, PatchGrid(8, 8, 8, 8), PatchGrid(8, 8, 8, 8)),  # a border of 6 pixels
        ((224, 224), 196, None, PatchGrid(14, 14, 16, 16)),  # an artifact of before
        ((32, 64), 32, None, PatchGrid(4, 8, 8, 8)),
    ],
)
def test_grid(size, patches, recorded, expected):
    values = manifest(size, patches, 5, asdict(recorded) if recorded else None)
    assert grid_from_manifest(values, WHERE) == (expected, 5)


@pytest.mark.parametrize(
    ("size", "patches", "recorded"),
    [
        ((224, 224), 195, None),
        ((70, 70), 64, None),
        ((224, 224), 196, {"rows": 7, "cols": 14, "height": 16, "width": 16}),
        ((200, 224), 196, {"rows": 14, "cols": 14, "height": 16, "width": 16}),
        ((224, 224), 195, {"rows": 14}),
    ],
)
def test_grid_that_cannot_be_told(size, patches, recorded):
    with pytest.raises(InputError) as caught:
        grid_from_manifest(manifest(size, patches, 1, recorded), WHERE)
    assert str(caught.value) == (
        f"the {patches} patches of some/artifact are not a grid over its images of {size[0]} x "
        f"{size[1]} pixels, so its tokens have no place in the image; only models that cut images "
        "into equal patches can be drawn"
    )


@pytest.mark.parametrize("missing", ["tokens_in", "prefix"])
def test_manifest_without_the_number_of_patches(missing):
    values = manifest((224, 224), 196)
    (values if missing == "tokens_in" else values["merge"]).pop(missing)
    with pytest.raises(InputError) as caught:
        grid_from_manifest(values, WHERE)
    assert str(caught.value) == (
        "some/artifact does not say how many tokens are patches; rebuild it with this version"
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
