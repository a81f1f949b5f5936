"""Images on disk to ``pixel_values``, exactly as timm's evaluation transform, without torch."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from tome_export.errors import InputError

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


def find_files(folder: str | Path, suffixes: Sequence[str], what: str) -> list[Path]:
    """Every file of a kind under a folder, sorted by path; a single file stands for itself.

    Args:
        folder: Where to look.
        suffixes: How their names end, in lower case.
        what: What messages call one of them.

    Raises:
        InputError: if there is no such folder or file, or none of them in it.
    """
    folder = Path(folder)
    article = "an" if what[0] in "aeiou" else "a"
    if folder.is_file():
        return [folder]
    if not folder.is_dir():
        raise InputError(
            f"{folder} does not exist; expected {article} {what} or a folder of {what}s"
        )
    found = sorted(p for p in folder.rglob("*") if p.suffix.lower() in suffixes)
    if not found:
        raise InputError(
            f"no {what}s under {folder}; expected files ending in {', '.join(suffixes)}"
        )
    return found


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
    return _eight_bit(upright, path)


def _eight_bit(image: Image.Image, path: str | Path) -> Image.Image:
    from PIL import Image

    if image.mode.startswith("I"):
        # Pillow's own conversion clips at 255; 16-bit samples are scaled instead.
        samples = np.asarray(image).astype(np.int64)
        if samples.min() < 0 or samples.max() > 0xFFFF:
            raise InputError(
                f"image {path} has pixels from {samples.min()} to {samples.max()}; "
                "expected 8 or 16 bits per channel"
            )
        return Image.fromarray((samples >> 8).astype(np.uint8))
    if image.mode == "F":
        raise InputError(
            f"image {path} has floating-point pixels; expected 8 or 16 bits per channel"
        )
    if "transparency" in image.info or image.mode in ("RGBA", "RGBa", "LA", "La", "PA"):
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image if image.mode in ("L", "RGB") else image.convert("RGB")


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
    channels, height, width = preprocessing.input_size
    modes = {1: "L", 3: "RGB"}
    if channels not in modes:
        raise InputError(
            f"the model takes {channels} channels; images can be given to models of 1 or 3"
        )
    image = image.convert(modes[channels])
    image = _centre_crop(_resize(image, preprocessing), height, width)
    x = np.asarray(image, dtype=np.float32).reshape(height, width, channels).transpose(2, 0, 1)
    mean = np.asarray(preprocessing.mean, np.float32)[:, None, None]
    std = np.asarray(preprocessing.std, np.float32)[:, None, None]
    return np.ascontiguousarray((x / np.float32(255) - mean) / std)


def _resize(image: Image.Image, preprocessing: Preprocessing) -> Image.Image:
    from PIL import Image

    _, height, width = preprocessing.input_size
    target_h = math.floor(height / preprocessing.crop_pct)
    target_w = math.floor(width / preprocessing.crop_pct)
    w, h = image.size
    if target_h == target_w:
        short, long = min(w, h), max(w, h)
        longer = int(target_h * long / short)
        size = (target_h, longer) if w <= h else (longer, target_h)
    else:
        # timm's ResizeKeepRatio: the smallest size that covers a target that is not square.
        ratio = min(h / target_h, w / target_w)
        size = (round(w / ratio), round(h / ratio))
    return image.resize(size, Image.Resampling[preprocessing.interpolation.upper()])


def _centre_crop(image: Image.Image, height: int, width: int) -> Image.Image:
    w, h = image.size
    # A crop_pct above 1 leaves less than the crop: black borders, as torchvision pads.
    left = round((w - width) / 2) if w >= width else -((width - w) // 2)
    top = round((h - height) / 2) if h >= height else -((height - h) // 2)
    return image.crop((left, top, left + width, top + height))
