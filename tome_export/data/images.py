"""Images and videos in memory, as a model takes them: those that parity is checked on, or named."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias, cast

import numpy as np
from numpy.typing import NDArray

from tome_export.artifact import Manifest
from tome_export.data.find import SHARDS, find_data
from tome_export.data.image_folder import read_file
from tome_export.data.source import Item, printable
from tome_export.errors import InputError
from tome_export.progress import Progress, Silent

if TYPE_CHECKING:
    from PIL.Image import Image

    from tome_export.models import Recipe
    from tome_export.spec import Preprocessing

Array = NDArray[np.float32]

ImageLike: TypeAlias = "str | os.PathLike[str] | Image | NDArray[np.uint8]"
"""A file, which may be a video, or an image in memory, as an array ``[H, W, 3]`` or ``[H, W]``."""

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
        return [_item(path) for path in find_images(place)]
    source = find_data((str(place),), None)
    for note in source.notes:
        progress.stage(f"Note: {note}")
    items = source.items(range(min(most, len(source))))
    if source.kind != "folder":
        return items
    # Named as the folder was, so that the file can be opened by what is shown.
    return [replace(item, name=printable(str(place / item.name))) for item in items]


def listed_inputs(images: ImageLike | Iterable[ImageLike]) -> list[ImageLike]:
    """One image, or several, as a list; what is neither is refused when it is read."""
    if isinstance(images, str | bytes | np.ndarray) or not isinstance(images, Iterable):
        return [cast("ImageLike", images)]
    return list(images)


def _item(path: Path) -> Item:
    """An image file by itself."""
    return Item(printable(str(path)), partial(read_file, str(path.parent), path.name, 0, 0))


def load_inputs(manifest: Manifest, images: Sequence[ImageLike]) -> Array:
    """Images ``[B, C, H, W]`` float32, or for a model of videos those, ``[B, F, C, H, W]``.

    Raises:
        InputError: if there is none, or one is nothing that is read; the message says which.
    """
    from tome_export.data.preprocess import load_videos

    if manifest.video is not None:
        for number, video in enumerate(images, 1):
            if not isinstance(video, str | os.PathLike):
                raise InputError(
                    f"video {number} is {_what(video)}; the model takes videos, give paths of files"
                )
        paths = cast("Sequence[str | Path]", images)
        return load_videos(paths, manifest.preprocessing, int(manifest.input.shape[1]))
    if not images:
        raise InputError("no images given; expected one or more")
    return np.stack(
        [_pixels(image, number, manifest.preprocessing) for number, image in enumerate(images, 1)]
    )


def _pixels(image: ImageLike, number: int, preprocessing: Preprocessing) -> Array:
    """One image ``[C, H, W]`` float32; a file is decoded as everywhere."""
    from PIL.Image import Image, fromarray

    from tome_export.data.preprocess import load_images, pixels_from_image

    if isinstance(image, str | os.PathLike):
        return np.asarray(load_images([os.fspath(image)], preprocessing)[0])
    if isinstance(image, np.ndarray) and image.dtype == np.uint8 and _is_picture(image.shape):
        image = fromarray(np.ascontiguousarray(image))
    if not isinstance(image, Image):
        raise InputError(
            f"image {number} is {_what(image)}; expected a path, a PIL image, or uint8 [H, W, 3] "
            "or [H, W], each image by itself; preprocessed pixels are for run()"
        )
    try:
        return pixels_from_image(image, preprocessing)
    except InputError as error:
        raise InputError(f"image {number} {str(error).removeprefix('image ')}") from None


def _is_picture(shape: tuple[int, ...]) -> bool:
    return len(shape) in (2, 3) and shape[2:] in ((), (3,))


def _what(given: object) -> str:
    """What a wrong image is, for an error."""
    if isinstance(given, np.ndarray):
        return f"an array {given.dtype} {list(given.shape)}"
    return f"of type {type(given).__qualname__}"


def input_items(manifest: Manifest, paths: Sequence[Path]) -> list[Item]:
    """Files as ``decode.Task`` has them: images to be decoded, or videos' pixels."""
    if manifest.video is None:
        return [_item(path) for path in paths]
    return [Item(printable(str(path)), partial(_video, manifest, path)) for path in paths]


def _video(manifest: Manifest, path: Path, _name: str) -> Array:
    return np.asarray(load_inputs(manifest, [path])[0])


def image_names(folder: Path | None, count: int, *, videos: bool = False) -> list[str]:
    """What to call the ``count`` images or videos that ``parity_images`` gave of a folder."""
    from tome_export.data.preprocess import find_videos

    if folder is None:
        return [f"sample {index}" for index in range(count)]
    if videos:
        return [printable(str(path)) for path in find_videos(folder)[:count]]
    return [item.name for item in _items(folder, count, Silent())]
