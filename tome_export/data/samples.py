"""Real images that come along, and videos of them, for parity checks and trials without data."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

from tome_export.data.preprocess import load_images, pixels_from_image, read_image
from tome_export.errors import InputError
from tome_export.models.facts import DATA

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray
    from PIL import Image

    from tome_export.models.recipe import Recipe
    from tome_export.spec import Preprocessing

PHOTOGRAPHS = ("astronaut", "chelsea", "coffee", "rocket", "hubble_deep_field", "camera")
MAX_PHOTOGRAPH_PIXELS = len(PHOTOGRAPHS) * 4

WINDOW = 0.75
"""Side of the part of a photograph that a moving sample shows."""


def sample_paths() -> list[Path]:
    """The six photographs; sources and licences are in ``models/data/README.md``."""
    return [DATA / f"{name}.jpg" for name in PHOTOGRAPHS]


def sample_pixels(recipe: Recipe, count: int) -> NDArray[np.float32]:
    """Preprocessed real images ``[count, C, H, W]`` float32 for a recipe.

    For ``vit_digits`` the first of its test images; for others the six photographs, then the same
    mirrored left to right, top to bottom, and both, so that up to 24 differ.
    """
    digits = recipe.name == "vit_digits"
    most = len(_digits()[1]) if digits else MAX_PHOTOGRAPH_PIXELS
    if not 1 <= count <= most:
        raise InputError(f"{count} sample images were asked for {recipe.name}; there are {most}")
    if digits:
        return _digit_pixels(_digits()[0][:count], recipe.preprocessing)
    photographs = load_images(sample_paths(), recipe.preprocessing)
    rows = 1 if recipe.preprocessing.form == "uint8" else 2  # the axis; columns are the next
    mirrored = [photographs, *(np.flip(photographs, axes) for axes in (rows + 1, rows))]
    mirrored.append(np.flip(photographs, (rows, rows + 1)))
    return np.ascontiguousarray(np.concatenate(mirrored)[:count])


def labelled_samples(recipe: Recipe) -> tuple[NDArray[np.float32], NDArray[np.int64]] | None:
    """As ``digits_test`` for the recipe that comes with labelled images; None for others."""
    return digits_test(recipe.preprocessing) if recipe.name == "vit_digits" else None


def digits_test(
    preprocessing: Preprocessing | None = None,
) -> tuple[NDArray[Any], NDArray[np.int64]]:
    """The 450 images that ``vit_digits`` was not trained on.

    Returns:
        ``pixel_values [450, 1, 32, 32]`` float32, or in another form of ``preprocessing``, and
        labels ``[450]`` int64.
    """
    from tome_export.models.registry import RECIPES

    images, labels = _digits()
    preprocessing = preprocessing or RECIPES["vit_digits"].preprocessing
    return _digit_pixels(images, preprocessing), labels.copy()


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


def moving_samples(preprocessing: Preprocessing, count: int, frames: int) -> NDArray[np.float32]:
    """Videos ``[count, F, C, H, W]`` float32 of the photographs: a window that moves across each.

    The n-th video of a photograph moves in the n-th direction: right, left, down, up.
    """
    videos = []
    for index in range(count):
        turn, photograph = divmod(index, len(PHOTOGRAPHS))
        image = read_image(sample_paths()[photograph])
        shown = [_window(image, step / max(1, frames - 1), turn % 4) for step in range(frames)]
        videos.append(np.stack([pixels_from_image(frame, preprocessing) for frame in shown]))
    return np.stack(videos)


def _window(image: Image.Image, done: float, direction: int) -> Image.Image:
    """The part of an image that is seen when a share of the way is done."""
    width, height = round(image.width * WINDOW), round(image.height * WINDOW)
    done = 1 - done if direction % 2 else done
    across, down = (done, 0.5) if direction < 2 else (0.5, done)
    left, top = round(across * (image.width - width)), round(down * (image.height - height))
    return image.crop((left, top, left + width, top + height))
