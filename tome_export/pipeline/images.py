"""The images that parity is checked on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from tome_export.errors import InputError

if TYPE_CHECKING:
    from tome_export.models import Recipe
    from tome_export.parity.decisions import Array

BUILD_COUNT = 4
"""Sample images that a build checks on when the user gives none."""

CHECK_COUNT = 24
"""Sample images for ``check``: all photographs that come along, with their mirror images."""

LIMIT = 64
"""Most images taken from a user's folder."""


def parity_images(
    recipe: Recipe, input_size: tuple[int, int, int], folder: Path | None, count: int
) -> Array:
    """Preprocessed images: the user's, or the recipe's samples.

    Args:
        recipe: Whose preprocessing to use.
        input_size: Channels, height and width the model takes.
        folder: Folder of images, or None.
        count: Sample images to take where no folder is given.

    Returns:
        ``[B, C, H, W]`` float32.

    Raises:
        InputError: if the folder holds no readable image.
    """
    from tome_export.models.preprocess import find_images, load_images
    from tome_export.models.samples import sample_pixels

    recipe = replace(recipe, preprocessing=replace(recipe.preprocessing, input_size=input_size))
    if folder is None:
        samples: Array = sample_pixels(recipe, count)
        return samples
    paths = find_images(folder)
    if not paths:
        raise InputError(f"{folder} holds no image; give a folder with .jpg or .png files")
    loaded: Array = load_images(paths[:LIMIT], recipe.preprocessing)
    return loaded


def image_names(folder: Path | None, count: int) -> list[str]:
    """What to call the images that ``parity_images`` gave.

    Args:
        folder: As given to it.
        count: Images that it gave.
    """
    from tome_export.models.preprocess import find_images

    if folder is None:
        return [f"sample {index}" for index in range(count)]
    return [path.name for path in find_images(folder)[:count]]
