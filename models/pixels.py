"""A decoded image to pixel values; also runs inside the server, beside its model.

Needs Pillow and NumPy, nothing of this package. Source of the steps: see ``spec.Preprocessing``.
"""

from __future__ import annotations

import io
import math
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

FORMATS = ("JPEG", "PNG")
"""What a server decodes."""

MODES = {1: "L", 3: "RGB"}

Settings = dict[str, Any]
"""``input_size`` [C, H, W], ``mean``, ``std``, ``crop_pct``, ``interpolation``, and ``max_pixels``:
larger images are refused; None or missing for no limit."""


class BadImageError(ValueError):
    """What cannot be used as an image; the message goes behind the image's name."""


def pixels_from_bytes(data: bytes, settings: Settings) -> np.ndarray[Any, Any]:
    """Decode and preprocess one JPEG or PNG file.

    Returns:
        ``[C, H, W]`` float32.

    Raises:
        BadImageError: if it is no such file, damaged, cut short, or too large.
    """
    try:
        return pixels_from_image(_decoded(data, settings["max_pixels"]), settings)
    except BadImageError:
        raise
    # Whatever a decoder trips over in a damaged file is that file's fault.
    except (Exception, MemoryError) as error:
        reason = (str(error).splitlines() or [""])[0] or type(error).__name__
        raise BadImageError(
            f"cannot be decoded ({reason}); the file is damaged or cut short, send it whole"
        ) from None


def _decoded(data: bytes, max_pixels: int) -> Image.Image:
    if not data:
        raise BadImageError("is empty; expected the bytes of a JPEG or PNG file")
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError:
        raise BadImageError(
            f"is not a JPEG or PNG file (it begins with {bytes(data[:8])!r}); send one whole"
        ) from None
    with image:
        width, height = image.size
        if width * height > max_pixels:
            raise BadImageError(
                f"is {width} x {height} pixels ({width * height / 1e6:.1f} megapixels); "
                f"at most {max_pixels / 1e6:.1f} megapixels are accepted, send a smaller one"
            )
        image.load()
        return eight_bit(ImageOps.exif_transpose(image))


def eight_bit(image: Image.Image) -> Image.Image:
    """An image as mode ``L`` or ``RGB``: on white where it is transparent, with the upper byte.

    Raises:
        BadImageError: if its samples have no range of 8 or 16 bits.
    """
    if image.mode.startswith("I"):
        # Pillow's own conversion clips at 255; 16-bit samples are scaled instead.
        samples = np.asarray(image).astype(np.int64)
        if samples.min() < 0 or samples.max() > 0xFFFF:
            raise BadImageError(
                f"has pixels from {samples.min()} to {samples.max()}; expected 8 or 16 bits per "
                "channel"
            )
        return Image.fromarray((samples >> 8).astype(np.uint8))
    if image.mode == "F":
        raise BadImageError("has floating-point pixels; expected 8 or 16 bits per channel")
    if "transparency" in image.info or image.mode in ("RGBA", "RGBa", "LA", "La", "PA"):
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image if image.mode in ("L", "RGB") else image.convert("RGB")


def pixels_from_image(image: Image.Image, settings: Settings) -> np.ndarray[Any, Any]:
    """Preprocess one 8-bit image.

    Returns:
        ``[C, H, W]`` float32.

    Raises:
        BadImageError: if it would become too large on the way.
    """
    channels, height, width = settings["input_size"]
    image = image.convert(MODES[channels])
    size, most = (
        _resized(image.size, height, width, settings["crop_pct"]),
        settings.get("max_pixels"),
    )
    if most is not None and size[0] * size[1] > max(most, 16 * height * width):
        raise BadImageError(
            f"is {image.size[0]} x {image.size[1]} pixels, which would be resized to "
            f"{size[0]} x {size[1]}; send one whose sides differ less"
        )
    image = image.resize(size, Image.Resampling[settings["interpolation"].upper()])
    image = _centre_crop(image, height, width)
    x = np.asarray(image, dtype=np.float32).reshape(height, width, channels).transpose(2, 0, 1)
    mean = np.asarray(settings["mean"], np.float32)[:, None, None]
    std = np.asarray(settings["std"], np.float32)[:, None, None]
    return np.ascontiguousarray((x / np.float32(255) - mean) / std)


def _resized(size: tuple[int, int], height: int, width: int, crop_pct: float) -> tuple[int, int]:
    target_h, target_w = math.floor(height / crop_pct), math.floor(width / crop_pct)
    w, h = size
    if target_h == target_w:
        longer = int(target_h * max(w, h) / min(w, h))
        return (target_h, longer) if w <= h else (longer, target_h)
    # timm's ResizeKeepRatio: the smallest size that covers a target that is not square.
    ratio = min(h / target_h, w / target_w)
    return round(w / ratio), round(h / ratio)


def _centre_crop(image: Image.Image, height: int, width: int) -> Image.Image:
    w, h = image.size
    # A crop_pct above 1 leaves less than the crop: black borders, as torchvision pads.
    left = round((w - width) / 2) if w >= width else -((width - w) // 2)
    top = round((h - height) / 2) if h >= height else -((height - h) // 2)
    return image.crop((left, top, left + width, top + height))
