"""Images on disk to ``pixel_values``, exactly as timm's evaluation transform, without torch."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from tome_export.errors import InputError
from tome_export.models import pixels
from tome_export.models.folders import find_files
from tome_export.models.pixels import BadImageError, eight_bit

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from PIL import Image

    from tome_export.spec import Preprocessing

IMAGE_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")


def find_images(folder: str | Path) -> list[Path]:
    """Every image under a folder, sorted by path; a single image file stands for itself.

    Raises:
        InputError: if there is no such folder or file, or no image in it.
    """
    return find_files(folder, IMAGE_SUFFIXES, "image")


def load_images(paths: Sequence[str | Path], preprocessing: Preprocessing) -> NDArray[np.float32]:
    """Read and preprocess images; see ``Preprocessing`` for the formula.

    EXIF orientation is applied; transparency is laid on white; 16-bit grey keeps its upper byte.

    Args:
        paths: Image files, at least one.
        preprocessing: How the model wants them.

    Returns:
        ``pixel_values [B, C, H, W]`` float32.

    Raises:
        InputError: naming the file, if one is missing, not an image, truncated, or of a pixel
            type without a defined range.
    """
    if not paths:
        raise InputError("no images given; expected at least one image file")
    return np.stack([pixels_from_image(read_image(p), preprocessing) for p in paths])


def read_image(path: str | Path) -> Image.Image:
    """Decode one image file upright, as mode ``L`` or ``RGB``.

    Raises:
        InputError: as ``load_images``.
    """
    path = Path(path)
    if not path.is_file():
        kind = "is a folder" if path.is_dir() else "does not exist"
        raise InputError(f"image {path} {kind}; expected an image file")
    return _decoded(path, path)


def pixels_from_bytes(data: bytes, name: str, preprocessing: Preprocessing) -> NDArray[np.float32]:
    """Decode and preprocess one encoded image.

    Args:
        data: The content of an image file.
        name: What an error calls it.
        preprocessing: How the model wants it.

    Returns:
        ``[C, H, W]`` float32.

    Raises:
        InputError: as ``load_images``.
    """
    return pixels_from_image(_decoded(io.BytesIO(data), name), preprocessing)


def _decoded(source: Path | io.BytesIO, path: str | Path) -> Image.Image:
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with Image.open(source) as image:
            image.load()
            upright = ImageOps.exif_transpose(image)
    except UnidentifiedImageError:
        raise InputError(
            f"{path} is not an image that can be read; expected JPEG, PNG or another format of PIL"
        ) from None
    # PIL's decoders report broken data as any of these.
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(
            f"image {path} cannot be decoded ({reason}); the file is damaged or cut short, "
            "replace it"
        ) from None
    try:
        return eight_bit(upright)
    except BadImageError as error:
        raise InputError(f"image {path} {error}") from None


def pixels_from_image(image: Image.Image, preprocessing: Preprocessing) -> NDArray[np.float32]:
    """Preprocess one decoded image.

    Args:
        image: Any 8-bit PIL image.
        preprocessing: How the model wants it.

    Returns:
        ``[C, H, W]`` float32.

    Raises:
        InputError: if the model wants other than one or three channels.
    """
    channels = preprocessing.input_size[0]
    if channels not in pixels.MODES:
        raise InputError(
            f"the model takes {channels} channels; images can be given to models of 1 or 3"
        )
    return pixels.pixels_from_image(image, asdict(preprocessing))
