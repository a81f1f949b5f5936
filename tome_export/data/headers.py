"""What the header of a JPEG or PNG file says of its image; also runs inside the server.

Needs nothing but Python, and decodes nothing: it is for programs that only look at strangers' files
to send them on.
"""

from __future__ import annotations

import re
from typing import Literal, NamedTuple

MOST_SEGMENTS = 200
"""Most segments of a JPEG file in front of its size; a colour profile of 10 MB takes 160."""

MOST_CHUNKS = 10_000
"""Most chunks of a PNG file that are gone through for its orientation."""

_PNG = b"\x89PNG\r\n\x1a\n"
_ORIENTATION = 0x0112
_WHOLE = {3: 2, 4: 4, 6: 1, 8: 2, 9: 4}
"""TIFF's types of whole numbers and their lengths: writers use others than the standard's SHORT.
Not BYTE, which Pillow has as bytes."""

_XMP = re.compile(rb'tiff:Orientation(?:="|>)([0-9])')
_ON_ITS_SIDE = range(5, 9)


class ImageHeader(NamedTuple):
    """Width and height as they are stored, and what may say how the image is held.

    Attributes:
        baseline: Whether it is a JPEG file that is decoded part by part (SOF0).
        exif: The content of EXIF.
        xmp: That of XMP.
    """

    width: int
    height: int
    baseline: bool = False
    exif: bytes = b""
    xmp: bytes = b""

    @property
    def upright(self) -> tuple[int, int]:
        """Width and height as its EXIF, or else its XMP, says it is held."""
        orientation = _exif_orientation(self.exif)
        if orientation is None:
            found = _XMP.search(self.xmp)
            orientation = int(found[1]) if found else 1
        on_its_side = orientation in _ON_ITS_SIDE
        return (self.height, self.width) if on_its_side else (self.width, self.height)


def read_header(data: bytes) -> ImageHeader | None:
    """The header of a JPEG or PNG file; None of another file, or where it has none that is whole.

    Orientation in a text of PNG other than XMP is not looked for.
    """
    found = _png_header(data) if data[:8] == _PNG else _jpeg_header(data)
    return found if found is not None and found.width and found.height else None


def _jpeg_header(data: bytes) -> ImageHeader | None:
    """The segments of a JPEG file (ITU-T T.81, B.1.1) up to the frame's, which has the size."""
    if data[:2] != b"\xff\xd8":
        return None
    exif = xmp = b""
    place = 2
    for _ in range(MOST_SEGMENTS):
        marker, length = data[place : place + 2], int.from_bytes(data[place + 2 : place + 4], "big")
        if marker == b"\xff\xff":  # fills up
            place += 1
            continue
        if len(marker) < 2 or marker[0] != 0xFF or length < 2:
            return None
        start, end = place + 4, place + 2 + length
        if 0xC0 <= marker[1] <= 0xCF and marker[1] not in (0xC4, 0xC8, 0xCC):
            height, width = _numbers(data[start + 1 : start + 5], 2)
            return ImageHeader(width, height, marker[1] == 0xC0, exif, xmp)
        if marker[1] == 0xE1 and data.startswith(b"Exif\0\0", start):
            exif = exif or data[start + 6 : end]
        if marker[1] == 0xE1 and data.startswith(b"http://ns.adobe.com/xap/1.0/\0", start):
            xmp = data[start:end]
        place = end
    return None


def _png_header(data: bytes) -> ImageHeader | None:
    """The chunks of a PNG file: the first has the size, EXIF and XMP may be behind the pixels."""
    if data[12:16] != b"IHDR":
        return None
    width, height = _numbers(data[16:24], 4)
    exif = xmp = b""
    place = 8
    for _ in range(MOST_CHUNKS):
        length, kind = int.from_bytes(data[place : place + 4], "big"), data[place + 4 : place + 8]
        start, end = place + 8, place + 8 + length
        if len(kind) < 4:
            break
        if kind == b"eXIf":
            exif = data[start:end]
        elif kind == b"iTXt" and data.startswith(b"XML:com.adobe.xmp\0", start):
            xmp = data[start:end]
        place = end + 4  # behind it is its checksum
    return ImageHeader(width, height, exif=exif, xmp=xmp)


def _numbers(data: bytes, length: int) -> tuple[int, int]:
    """Two numbers of so many bytes; 0 where they are cut off."""
    if len(data) < 2 * length:
        return 0, 0
    return int.from_bytes(data[:length], "big"), int.from_bytes(data[length:], "big")


def _exif_orientation(exif: bytes) -> int | None:
    """The orientation in the first directory of EXIF, which is a TIFF file; None without."""
    order: Literal["little", "big"] = "little" if exif[:2] == b"II" else "big"

    def number(at: int, length: int) -> int:
        return int.from_bytes(exif[at : at + length], order)

    at = number(4, 4)
    for entry in range(at + 2, min(at + 2 + 12 * number(at, 2), len(exif)), 12):
        length = _WHOLE.get(number(entry + 2, 2))
        if number(entry, 2) == _ORIENTATION and length is not None:
            return number(entry + 8, length)
    return None
