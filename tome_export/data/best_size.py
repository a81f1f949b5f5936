"""Which of several image sizes wastes least of an image; also runs inside the server.

Needs nothing but Python: a router decodes no image, it reads sizes from the headers of files.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal

MOST_PARTS = 10_000
"""Most parts of a file that are gone through for its size and orientation."""

_PNG = b"\x89PNG\r\n\x1a\n"
_ORIENTATION, _SHORT = 0x0112, 3  # a tag and a type of TIFF
_XMP = re.compile(rb'tiff:Orientation(?:="|>)([0-9])')
_ON_ITS_SIDE = range(5, 9)


def waste(
    image: tuple[int, int], size: tuple[int, int], crop_pct: float = 1.0, resize: str = "crop"
) -> float:
    """How much is wasted when an image becomes the input of a model of some image size.

    It is the sum of four shares, each 0 where nothing is wasted and below 1:

    - cropped: of the image's area, what lies outside of the cut;
    - empty: of the input's area, what is border and no image (``pad``, ``letterbox``);
    - resampled: of the finer of image and input, ``1 - min(a, 1 / a)``, where ``a`` is input pixels
      per image pixel. Above 1 it is the pixels that are computed although enlarging has invented
      them, below 1 the image's pixels that are lost to shrinking. Of two sizes of one shape, an
      image gets the larger one from the geometric mean of both on;
    - distorted: ``1 - s / t``, where ``s`` is the smaller and ``t`` the larger of the scales of the
      two axes (``squash``).

    For a photo that is much larger than all sizes the third share is close to 1 for each, so its
    shape decides; among sizes of its shape it gets the largest.

    Args:
        image: Width and height of the image, upright.
        size: Height and width of the model's images.
        crop_pct: See ``spec.Preprocessing``, as for ``resize``.
        resize: How the image is brought to the size.
    """
    width, height = image
    scales = size[1] / crop_pct / width, size[0] / crop_pct / height
    if resize == "crop":
        scales = (max(scales),) * 2
    elif resize != "squash":
        scales = (min(scales),) * 2
    spans = scales[0] * width / size[1], scales[1] * height / size[0]
    seen = min(1, 1 / spans[0]) * min(1, 1 / spans[1])
    covered = min(1, spans[0]) * min(1, spans[1])
    area = scales[0] * scales[1]
    cropped, empty = 1 - seen, 1 - covered
    resampled, distorted = 1 - min(area, 1 / area), 1 - min(scales) / max(scales)
    return cropped + empty + resampled + distorted


def best_size(
    image: tuple[int, int],
    sizes: Sequence[tuple[int, int]],
    crop_pct: float = 1.0,
    resize: str = "crop",
) -> tuple[int, int]:
    """The image size of least ``waste``; of equal ones that of fewest pixels, then the lower one.

    ``image`` is width and height, ``sizes`` and the answer are height and width.
    """
    return min(
        sizes,
        key=lambda size: (round(waste(image, size, crop_pct, resize), 9), size[0] * size[1], size),
    )


def upright_size(data: bytes) -> tuple[int, int] | None:
    """Width and height of a JPEG or PNG file, as its EXIF or XMP says it is held.

    None where the header does not say, as in a damaged file.
    """
    size, exif, xmp = (_png_header if data[:8] == _PNG else _jpeg_header)(data)
    if not all(size):
        return None
    orientation = _exif_orientation(exif)
    if orientation is None:
        found = _XMP.search(xmp)
        orientation = int(found[1]) if found else 1
    return size[::-1] if orientation in _ON_ITS_SIDE else size


Header = tuple[tuple[int, int], bytes, bytes]
"""Width and height as they are stored, 0 where unknown; the content of EXIF; that of XMP."""


def _jpeg_header(data: bytes) -> Header:
    """The segments of a JPEG file (ITU-T T.81, B.1.1) up to the frame's, which has the size."""
    exif = xmp = b""
    place = 2
    for _ in range(MOST_PARTS if data[:2] == b"\xff\xd8" else 0):
        marker, length = data[place : place + 2], int.from_bytes(data[place + 2 : place + 4], "big")
        if marker == b"\xff\xff":  # fills up
            place += 1
            continue
        if len(marker) < 2 or marker[0] != 0xFF or length < 2:
            break
        start, end = place + 4, place + 2 + length
        if 0xC0 <= marker[1] <= 0xCF and marker[1] not in (0xC4, 0xC8, 0xCC):
            height, width = (
                int.from_bytes(data[at : at + 2], "big") for at in (start + 1, start + 3)
            )
            return (width, height), exif, xmp
        if marker[1] == 0xE1 and data.startswith(b"Exif\0\0", start):
            exif = exif or data[start + 6 : end]
        if marker[1] == 0xE1 and data.startswith(b"http://ns.adobe.com/xap/1.0/\0", start):
            xmp = data[start:end]
        place = end
    return (0, 0), exif, xmp


def _png_header(data: bytes) -> Header:
    """The chunks of a PNG file; EXIF and XMP may stand behind the pixels."""
    exif = xmp = b""
    size, place = (0, 0), 8
    for _ in range(MOST_PARTS):
        length, kind = int.from_bytes(data[place : place + 4], "big"), data[place + 4 : place + 8]
        start, end = place + 8, place + 8 + length
        if len(kind) < 4:
            break
        if kind == b"IHDR":
            width, height = (int.from_bytes(data[at : at + 4], "big") for at in (start, start + 4))
            size = width, height
        elif kind == b"eXIf":
            exif = data[start:end]
        elif kind == b"iTXt" and data.startswith(b"XML:com.adobe.xmp\0", start):
            xmp = data[start:end]
        place = end + 4  # behind it is its checksum
    return size, exif, xmp


def _exif_orientation(exif: bytes) -> int | None:
    """The orientation in the first directory of EXIF, which is a TIFF file; None without."""
    order: Literal["little", "big"] = "little" if exif[:2] == b"II" else "big"

    def number(at: int, length: int) -> int:
        return int.from_bytes(exif[at : at + length], order)

    at = number(4, 4)
    for entry in range(at + 2, min(at + 2 + 12 * number(at, 2), len(exif)), 12):
        if number(entry, 2) == _ORIENTATION and number(entry + 2, 2) == _SHORT:
            return number(entry + 8, 2)
    return None
