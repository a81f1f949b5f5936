"""The images that parity is checked on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from tome_export.artifact import Manifest
from tome_export.errors import InputError
from tome_export.spec import Preprocessing

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
    recipe: Recipe, input_size: tuple[int, ...], folder: Path | None, count: int
) -> Array:
    """Preprocessed images or videos: the user's, or the samples that come along.

    Args:
        recipe: Whose preprocessing to use.
        input_size: Channels, height and width the model takes; the frames of a video first.
        folder: Folder of images or videos, or None.
        count: Sample images to take where no folder is given; of videos a third.

    Returns:
        ``[B, C, H, W]`` float32, or ``[B, F, C, H, W]``.

    Raises:
        InputError: if the folder holds no readable image or video.
        MissingComponentError: if videos are given, and what decodes them is not installed.
    """
    from tome_export.models.preprocess import find_images, load_images
    from tome_export.models.samples import sample_pixels

    channels, height, width = input_size[-3:]
    preprocessing = replace(recipe.preprocessing, input_size=(channels, height, width))
    recipe = replace(recipe, preprocessing=preprocessing)
    if len(input_size) > 3:
        return _videos(preprocessing, input_size[0], folder, max(2, count // 3))
    if folder is None:
        samples: Array = sample_pixels(recipe, count)
        return samples
    paths = find_images(folder)
    if not paths:
        raise InputError(f"{folder} holds no image; give a folder with .jpg or .png files")
    loaded: Array = load_images(paths[:LIMIT], recipe.preprocessing)
    return loaded


def load_inputs(manifest: Manifest, paths: Sequence[Path]) -> Array:
    """Image files, or the video files of an artifact that takes videos, as it takes them.

    Returns:
        ``[B, C, H, W]`` float32, or ``[B, F, C, H, W]``.

    Raises:
        InputError: naming the file, if one cannot be used.
        MissingComponentError: if what decodes videos is not installed.
    """
    from tome_export.models.preprocess import load_images
    from tome_export.models.video import load_videos

    preprocessing = manifest.preprocessing
    video = manifest.video
    loaded: Array
    if video:
        loaded = load_videos(paths, preprocessing, video.frames)
    else:
        loaded = load_images(paths, preprocessing)
    return loaded


def _videos(preprocessing: Preprocessing, frames: int, folder: Path | None, count: int) -> Array:
    from tome_export.models.video import find_videos, load_videos, moving_samples

    if folder is None:
        samples: Array = moving_samples(preprocessing, count, frames)
        return samples
    paths = find_videos(folder)
    found: Array = load_videos(paths[: max(1, LIMIT // frames)], preprocessing, frames)
    return found


def image_names(folder: Path | None, count: int, *, videos: bool = False) -> list[str]:
    """What to call the images or videos that ``parity_images`` gave.

    Args:
        folder: As given to it.
        count: Images that it gave.
        videos: Whether they are videos.
    """
    from tome_export.models.preprocess import find_images
    from tome_export.models.video import find_videos

    if folder is None:
        return [f"sample {index}" for index in range(count)]
    find = find_videos if videos else find_images
    return [path.name for path in find(folder)[:count]]
