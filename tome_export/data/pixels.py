"""A decoded image to pixel values; also runs inside the server, beside its model.

Needs Pillow and NumPy, nothing of this package. Source of the steps: see ``spec.Preprocessing``.
"""

from __future__ import annotations

import contextlib
import io
import math
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "PPM", "TIFF")
"""What is read, by Pillow's names; of several frames the first. Each further format of Pillow's is
one more decoder that strangers' files can reach."""

SERVED_FORMATS = ("JPEG", "PNG")
"""What a server takes from its clients."""

MAX_PIXELS = 64_000_000
"""Larger images are refused from their header."""

MAX_SCANS = 64
"""Scans of a progressive JPEG, each of which goes through all of its pixels; encoders make 10."""

SCALED_GAP = 1.5
"""How many times the size that it is resized to a JPEG file has at least, once it was decoded at a
part of its own size (``scaled_decoding``)."""

ROWS = 256
"""Rows of an image that transparency is removed from at a time."""

MODES = {1: "L", 3: "RGB"}

Settings = dict[str, Any]
"""The fields of ``spec.Preprocessing``; where they differ from the constants above, ``max_pixels``
and ``formats``; ``scaled_decoding`` where JPEG files may be decoded at a part of their size."""


_MEMORY = "takes more memory to decode than is allowed; give a smaller one"


class BadImageError(ValueError):
    """What cannot be used as an image; the message goes behind the image's name."""


def pixels_from_bytes(data: bytes, settings: Settings) -> np.ndarray[Any, Any]:
    """``image_from_bytes``, then ``pixels_from_image``."""
    return pixels_from_image(image_from_bytes(data, settings), settings)


def image_from_bytes(data: bytes, settings: Settings) -> Image.Image:
    """Decode one image file upright, as mode ``L`` or ``RGB``; of ``settings`` only the limits."""
    names = _names(settings.get("formats", FORMATS))
    if not data:
        raise BadImageError(f"is empty; expected the bytes of a {names} file")
    with _faults_named(settings), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Pillow: about metadata, which is not used here
        return _decoded(data, settings, names)


def upright(image: Image.Image, settings: Settings) -> Image.Image:
    """An opened or decoded image as mode ``L`` or ``RGB``, as its EXIF or XMP says it is held."""
    with _faults_named(settings):
        if not all(image.size):
            raise BadImageError("has no pixels; expected one or more each way")
        _check_size(*image.size, settings)
        image.load()
        turn = _TURNS.get(_orientation(image))
        plain = eight_bit(image)
        return plain if turn is None else plain.transpose(turn)


@contextlib.contextmanager
def _faults_named(settings: Settings) -> Iterator[None]:
    """Whatever a decoder raises as a ``BadImageError``."""
    try:
        yield
    except BadImageError:
        raise
    except Image.DecompressionBombError:
        raise BadImageError(_too_large(settings)) from None
    except MemoryError:
        raise BadImageError(_MEMORY) from None
    # Whatever a decoder trips over in a damaged file is that file's fault.
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        if reason.endswith(("decoder error -9", "out of memory when reading image file")):
            raise BadImageError(_MEMORY) from None
        if "MAX_TEXT" in reason:
            raise BadImageError(
                "has more text or a larger colour profile than is read; give it without them"
            ) from None
        raise BadImageError(
            f"cannot be decoded ({reason[:200]}); the file is damaged or cut short, give it whole"
        ) from None


def _decoded(data: bytes, settings: Settings, names: str) -> Image.Image:
    formats = settings.get("formats", FORMATS)
    if "WEBP" in formats and (data[:4], data[8:12]) == (b"RIFF", b"WEBP"):
        _check_size(*_webp_size(data), settings)  # its reader takes memory for it at once
    try:
        image = Image.open(io.BytesIO(data), formats=formats)
    except UnidentifiedImageError:
        accepts = {name: Image.OPEN[name][1] for name in formats}
        kind = next((name for name, accept in accepts.items() if accept and accept(data[:16])), "")
        if kind:
            raise BadImageError(
                f"cannot be decoded (it begins as a {kind} file and has no valid header); the file "
                "is damaged or cut short, give it whole"
            ) from None
        raise BadImageError(
            f"is not a {names} file (it begins with {bytes(data[:8])!r}); give one whole"
        ) from None
    with image:
        _check_size(*image.size, settings)
        if image.format in ("JPEG", "MPO"):
            # Each scan begins with these two bytes: few of them cannot be many scans, and are
            # counted in a tenth of the time.
            if data.count(b"\xff\xda") > MAX_SCANS and scans(data) > MAX_SCANS:
                raise BadImageError(
                    f"is a JPEG file of more than {MAX_SCANS} scans; save it anew, encoders make 10"
                )
            if settings.get("scaled_decoding"):
                _scale_down(image, settings)
        return upright(image, settings)


def _scale_down(image: Image.Image, settings: Settings) -> None:
    """Let an opened JPEG file be decoded at a half, quarter or eighth of its size.

    Its decoder leaves high frequencies out then, which resizing would remove as well. It is done
    where both sides keep ``SCALED_GAP`` times what they are resized to.
    """
    _, height, width = settings["input_size"]
    least = SCALED_GAP * max(height, width) / settings["crop_pct"]
    part = next((part for part in (8, 4, 2) if part * least <= min(image.size)), 1)
    if part > 1:
        image.draft(None, (image.width // part, image.height // part))


def _check_size(width: int, height: int, settings: Settings) -> None:
    if width * height > _most(settings):
        raise BadImageError(
            f"is {width} x {height} pixels ({width * height / 1e6:.1f} megapixels); "
            f"{_too_large(settings)}"
        )


def _webp_size(data: bytes) -> tuple[int, int]:
    """Size of a WebP image, by the container's «Extended File Format» and its two codecs."""
    kind, at = data[12:16], {b"VP8X": 24, b"VP8L": 21}.get(data[12:16], 26)
    if kind == b"VP8X":
        sizes = [int.from_bytes(data[start : start + 3], "little") + 1 for start in (at, at + 3)]
    elif kind == b"VP8L":
        bits = int.from_bytes(data[at : at + 4], "little")
        sizes = [(bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1]
    else:
        both = (data[start : start + 2] for start in (at, at + 2))
        sizes = [int.from_bytes(one, "little") & 0x3FFF for one in both]
    return sizes[0], sizes[1]


def _names(formats: Sequence[str]) -> str:
    *others, last = formats
    return f"{', '.join(others)} or {last}" if others else last


def _most(settings: Settings) -> int:
    return settings.get("max_pixels") or MAX_PIXELS


def _too_large(settings: Settings) -> str:
    return f"at most {_most(settings) / 1e6:.1f} megapixels are accepted, give a smaller one"


_MARKER = re.compile(rb"\xff+([^\x00\xff\xd0-\xd7])")
"""A marker of JPEG other than those inside a scan: stuffed zeros and restarts."""


def scans(data: bytes) -> int:
    """Scans of a JPEG file's first image, counted up to one more than ``MAX_SCANS``."""
    count, place = 0, 2
    while count <= MAX_SCANS and (found := _MARKER.search(data, place)):
        marker, place = found[1], found.end()
        if marker == b"\xd9":
            break
        if marker == b"\x01":  # has no content
            continue
        count += marker == b"\xda"
        place += int.from_bytes(data[place : place + 2], "big")
    return count


_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF orientation -> what puts it upright."""


def _orientation(image: Image.Image) -> Any:
    """Of EXIF or XMP; None where there is none, or none that can be read."""
    try:
        value = image.getexif().get(0x0112)
    # Whatever damaged metadata makes of its reader, the pixels are as they are.
    except Exception:
        return None
    return value if isinstance(value, int) else None


def eight_bit(image: Image.Image) -> Image.Image:
    """An image as mode ``L`` or ``RGB``: on white where it is transparent, with the upper byte."""
    if image.mode.startswith("I"):
        # Pillow's own conversion clips at 255; 16-bit samples are scaled instead.
        samples = np.asarray(image)
        if samples.dtype.itemsize > 2 and (samples.min() < 0 or samples.max() > 0xFFFF):
            raise BadImageError(
                f"has pixels from {samples.min()} to {samples.max()}; expected 8 or 16 bits per "
                "channel"
            )
        return Image.fromarray((samples >> 8).astype(np.uint8))
    if image.mode == "F":
        raise BadImageError("has floating-point pixels; expected 8 or 16 bits per channel")
    if "transparency" in image.info or image.mode in ("RGBA", "RGBa", "LA", "La", "PA"):
        return _on_white(image)
    return image if image.mode in ("L", "RGB") else image.convert("RGB")


def _on_white(image: Image.Image) -> Image.Image:
    """Row by row of blocks, since a conversion takes four bytes a pixel, and here are four."""
    laid = Image.new("RGB", image.size)
    for top in range(0, image.height, ROWS):
        block = image.crop((0, top, image.width, min(top + ROWS, image.height))).convert("RGBA")
        white = Image.new("RGBA", block.size, "white")
        laid.paste(Image.alpha_composite(white, block).convert("RGB"), (0, top))
    return laid


def pixels_from_image(image: Image.Image, settings: Settings) -> np.ndarray[Any, Any]:
    """Preprocess one 8-bit image to ``[C, H, W]`` float32, or to the ``form`` of the settings."""
    channels, height, width = settings["input_size"]
    image = image if image.mode == MODES[channels] else image.convert(MODES[channels])
    image = _fitted(image, settings)
    x = np.array(image).reshape(height, width, channels)
    form = settings.get("form", "float32")
    if form == "uint8":
        return x
    x = np.ascontiguousarray(x.transpose(2, 0, 1))
    return x if form == "uint8-nchw" else normalised(x, settings)


def normalised(x: np.ndarray[Any, Any], settings: Settings) -> np.ndarray[Any, Any]:
    """Pixels in uint8 as ``[..., C, H, W]`` float32, scaled and normalised.

    They are ``[..., H, W, C]`` of the form ``uint8``, else ``[..., C, H, W]``.
    """
    x = np.moveaxis(x, -1, -3) if settings.get("form") == "uint8" else x
    # In place: new arrays for each step take ten times as long.
    found = np.ascontiguousarray(x).astype(np.float32)
    found /= np.float32(255)
    found -= np.asarray(settings["mean"], np.float32)[:, None, None]
    found /= np.asarray(settings["std"], np.float32)[:, None, None]
    return found


def _fitted(image: Image.Image, settings: Settings) -> Image.Image:
    """An image resized and cut to the size of the model's images."""
    _, height, width = settings["input_size"]
    fill = tuple(settings["fill"]) or (0,) * len(image.getbands())
    if settings["resize"] == "pad":
        image = _padded(image, height, width, fill, settings)
    crop_pct = settings["crop_pct"]
    targets = math.floor(height / crop_pct), math.floor(width / crop_pct)
    size = _resized(image.size, *targets, settings["resize"])
    if size[0] * size[1] > max(_most(settings), 16 * height * width):
        raise _stretched(image, f"resized to {size[0]} x {size[1]}")
    image = image.resize(size, Image.Resampling[settings["interpolation"].upper()])
    return _centre_cut(
        image, height, width, fill, round if settings["crop_offset"] == "round" else math.floor
    )


def _stretched(image: Image.Image, what: str) -> BadImageError:
    return BadImageError(
        f"is {image.width} x {image.height} pixels, which would be {what}; give one whose sides "
        "differ less"
    )


def _padded(
    image: Image.Image, height: int, width: int, fill: tuple[int, ...], settings: Settings
) -> Image.Image:
    """An image in the middle of the smallest canvas of the shape ``[height, width]``."""
    w, h = image.size
    size = max(w, -(-h * width // height)), max(h, -(-w * height // width))
    if size == image.size:
        return image
    if size[0] * size[1] > 2 * _most(settings):
        raise _stretched(image, f"padded to {size[0]} x {size[1]}")
    canvas = Image.new(image.mode, size, fill)
    canvas.paste(image, ((size[0] - w) // 2, (size[1] - h) // 2))
    return canvas


def _resized(size: tuple[int, int], target_h: int, target_w: int, resize: str) -> tuple[int, int]:
    w, h = size
    if resize in ("squash", "pad"):
        return target_w, target_h
    if resize == "crop" and target_h == target_w:
        longer = int(target_h * max(w, h) / min(w, h))
        return (target_h, longer) if w <= h else (longer, target_h)
    # timm's ResizeKeepRatio: the smallest size that covers a target that is not square, or the
    # largest that fits into it.
    ratios = h / target_h, w / target_w
    ratio = min(ratios) if resize == "crop" else max(ratios)
    return max(1, round(w / ratio)), max(1, round(h / ratio))


def _centre_cut(
    image: Image.Image,
    height: int,
    width: int,
    fill: tuple[int, ...],
    rounded: Callable[[float], int],
) -> Image.Image:
    w, h = image.size
    if (w, h) == (width, height):
        return image
    # Where there is less than the cut, as with a crop_pct above 1, torchvision's borders.
    left = rounded((w - width) / 2) if w >= width else -((width - w) // 2)
    top = rounded((h - height) / 2) if h >= height else -((height - h) // 2)
    canvas = Image.new(image.mode, (width, height), fill)
    canvas.paste(image, (-left, -top))
    return canvas
