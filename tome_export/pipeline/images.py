"""The images that parity is checked on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from tome_export.errors import InputError

if TYPE_CHECKING:
    from tome_export.models import Recipe
    from tome_export.parity.decisions import Array

DEFAULT_COUNT = 4
"""Sample images when the user gives none."""

LIMIT = 64
"""Most images taken from a user's folder."""


def parity_images(recipe: Recipe, input_size: tuple[int, int, int], folder: Path | None) -> Array:
    """Preprocessed images: the user's, or the recipe's samples.

    Args:
        recipe: Whose preprocessing to use.
        input_size: Channels, height and width the model takes.
        folder: Folder of images, or None.

    Returns:
        ``[B, C, H, W]`` float32.

    Raises:
        InputError: if the folder holds no readable image.
    """
    from tome_export.models.preprocess import find_images, load_images
    from tome_export.models.samples import sample_pixels

    recipe = replace(recipe, preprocessing=replace(recipe.preprocessing, input_size=input_size))
    if folder is None:
        samples: Array = sample_pixels(recipe, DEFAULT_COUNT)
        return samples
    paths = find_images(folder)
    if not paths:
        raise InputError(f"{folder} holds no image; give a folder with .jpg or .png files")
    loaded: Array = load_images(paths[:LIMIT], recipe.preprocessing)
    return loaded
