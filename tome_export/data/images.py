"""Images and videos in memory, as a model takes them: those that parity is checked on, or named."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from tome_export.artifact import Manifest
from tome_export.data.find import SHARDS, find_data
from tome_export.data.image_folder import read_file
from tome_export.data.source import Item, printable
from tome_export.errors import InputError
from tome_export.progress import Progress, Silent

if TYPE_CHECKING:
    from tome_export.models import Recipe

Array = NDArray[np.float32]

BUILD_COUNT = 4
"""Sample images that a build checks on when the user gives none."""

CHECK_COUNT = 24
"""Sample images for ``check``: all photographs that come along, with their mirror images."""

LIMIT = 64
"""Most images taken from a user's folder."""


def parity_images(
    recipe: Recipe,
    input_size: tuple[int, ...],
    folder: Path | None,
    count: int,
    progress: Progress | None = None,
) -> Array:
    """Preprocessed images or videos: the user's, or without a folder the samples that come along.

    ``count`` of these, of videos a third: ``[B, C, H, W]`` float32, or ``[B, F, C, H, W]``.
    ``input_size`` is channels, height and width, for videos behind the number of frames.
    """
    from tome_export.data.preprocess import find_videos, load_videos, pixels_from_bytes
    from tome_export.data.samples import moving_samples, sample_pixels

    channels, height, width = input_size[-3:]
    preprocessing = replace(recipe.preprocessing, input_size=(channels, height, width))
    if len(input_size) > 3:
        frames = input_size[0]
        if folder is None:
            return moving_samples(preprocessing, max(2, count // 3), frames)
        return load_videos(find_videos(folder)[: max(1, LIMIT // frames)], preprocessing, frames)
    if folder is None:
        return sample_pixels(replace(recipe, preprocessing=preprocessing), count)
    found = []
    for item in _items(folder, LIMIT, progress or Silent()):
        try:
            data = item.load()
        except OSError as error:
            raise InputError(
                f"image {item.name} cannot be read ({error.strerror}); expected an image file"
            ) from None
        if isinstance(data, bytes):
            data = pixels_from_bytes(data, item.name, preprocessing)
        found.append(data)
    return np.stack(found)


def _items(place: Path, most: int, progress: Progress) -> list[Item]:
    """The first images of a folder or of shards; a single image file stands for itself."""
    from tome_export.data.preprocess import find_images

    if not place.is_dir() and place.suffix.lower() not in SHARDS:
        (path,) = find_images(place)
        read = partial(read_file, str(path.parent), path.name, 0, 0)
        return [Item(printable(str(path)), read)]
    source = find_data((str(place),), None)
    for note in source.notes:
        progress.stage(f"Note: {note}")
    items = source.items(range(min(most, len(source))))
    if source.kind != "folder":
        return items
    # Named as the folder was, so that the file can be opened by what is shown.
    return [replace(item, name=printable(str(place / item.name))) for item in items]


def load_inputs(manifest: Manifest, paths: Sequence[Path]) -> Array:
    """Images ``[B, C, H, W]`` float32, or for a model of videos those, ``[B, F, C, H, W]``."""
    from tome_export.data.preprocess import load_images, load_videos

    if manifest.video is not None and manifest.video.frames is not None:
        return load_videos(paths, manifest.preprocessing, manifest.video.frames)
    return load_images(paths, manifest.preprocessing)


def image_names(folder: Path | None, count: int, *, videos: bool = False) -> list[str]:
    """What to call the ``count`` images or videos that ``parity_images`` gave of a folder."""
    from tome_export.data.preprocess import find_videos

    if folder is None:
        return [f"sample {index}" for index in range(count)]
    if videos:
        return [printable(str(path)) for path in find_videos(folder)[:count]]
    return [item.name for item in _items(folder, count, Silent())]
