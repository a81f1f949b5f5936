"""Real images that come with the package, for parity checks and trials without any data."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

import numpy as np

from tome_export.data.preprocess import load_images, pixels_from_image
from tome_export.errors import InputError
from tome_export.models.recipe import DATA

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from tome_export.models.recipe import Recipe
    from tome_export.spec import Preprocessing

PHOTOGRAPHS = ("astronaut", "chelsea", "coffee", "rocket", "hubble_deep_field", "camera")
MAX_PHOTOGRAPH_PIXELS = len(PHOTOGRAPHS) * 4


def sample_paths() -> list[Path]:
    """The six photographs; sources and licences are in ``models/data/README.md``."""
    return [DATA / f"{name}.jpg" for name in PHOTOGRAPHS]


def sample_pixels(recipe: Recipe, count: int) -> NDArray[np.float32]:
    """Preprocessed real images ``[count, C, H, W]`` float32 for a recipe.

    For ``vit_digits`` the first of its test images; for others the six photographs, then the same
    mirrored left to right, top to bottom, and both, so that up to 24 differ.

    Raises:
        InputError: if more are asked for than there are.
    """
    digits = recipe.name == "vit_digits"
    most = len(_digits()[1]) if digits else MAX_PHOTOGRAPH_PIXELS
    if not 1 <= count <= most:
        raise InputError(f"{count} sample images were asked for {recipe.name}; there are {most}")
    if digits:
        return _digit_pixels(_digits()[0][:count], recipe.preprocessing)
    photographs = load_images(sample_paths(), recipe.preprocessing)
    mirrored = [photographs[..., ::v, ::h] for v, h in ((1, 1), (1, -1), (-1, 1), (-1, -1))]
    return np.ascontiguousarray(np.concatenate(mirrored)[:count])


def labelled_samples(recipe: Recipe) -> tuple[NDArray[np.float32], NDArray[np.int64]] | None:
    """Labelled test images that come with a recipe's own weights; None where there are none.

    Returns:
        ``pixel_values [B, C, H, W]`` float32 and labels ``[B]`` int64.
    """
    return digits_test() if recipe.bundled and recipe.name == "vit_digits" else None


def digits_test() -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """The 450 images that ``vit_digits`` was not trained on.

    Returns:
        ``pixel_values [450, 1, 32, 32]`` float32 and labels ``[450]`` int64.
    """
    from tome_export.models.registry import RECIPES

    images, labels = _digits()
    return _digit_pixels(images, RECIPES["vit_digits"].preprocessing), labels.copy()


def _digit_pixels(images: NDArray[np.uint8], preprocessing: Preprocessing) -> NDArray[np.float32]:
    from PIL import Image

    return np.stack([pixels_from_image(Image.fromarray(image), preprocessing) for image in images])


@cache
def _digits() -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    with np.load(DATA / "digits_test.npz", allow_pickle=False) as archive:
        images, labels = archive["images"], archive["labels"]
    images.setflags(write=False)
    labels.setflags(write=False)
    return images, labels
