"""Small image files that take a decoder without limits long, or much memory."""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any

from PIL import Image


def segment(marker: int, data: bytes) -> bytes:
    return bytes([0xFF, marker]) + struct.pack(">H", len(data) + 2) + data


def progressive(side: int, scans: int) -> bytes:
    """A grey progressive JPEG, black, of so many scans besides the first.

    Its code has one bit for «no change» in the first scan, and in the others one for «the next
    16,384 + n blocks are empty», with the 14 bits of n.
    """
    blocks = (-(-side // 8)) ** 2
    bits, left = "", blocks
    while left >= 16_384:
        run = min(left, 32_767)
        bits += "0" + format(run - 16_384, "014b")
        left -= run
    bits += "10" * left  # one empty block each
    bits += "1" * (-len(bits) % 8)
    empty = bytes(int(bits[at : at + 8], 2) for at in range(0, len(bits), 8))
    empty = empty.replace(b"\xff", b"\xff\x00")
    first = b"\0" * (blocks // 8) + (b"\x7f" if blocks % 8 else b"")
    return b"".join(
        [
            b"\xff\xd8",
            segment(0xDB, b"\0" + b"\1" * 64),
            segment(0xC2, struct.pack(">BHHB", 8, side, side, 1) + b"\1\x11\0"),
            segment(0xC4, b"\x00" + bytes([1] + [0] * 15) + b"\0"),
            segment(0xC4, b"\x10" + bytes([1, 1] + [0] * 14) + b"\xe0\x00"),
            segment(0xDA, b"\1\1\0\0\0\0") + first,
            (segment(0xDA, b"\1\1\0\1\x3f\0") + empty) * scans,
            b"\xff\xd9",
        ]
    )


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    stream = io.BytesIO()
    # Copies: a saved image keeps what the next format's writer does not take.
    if "append_images" in options:
        options["append_images"] = [frame.copy() for frame in options["append_images"]]
    image.copy().save(stream, kind, **options)
    return stream.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    body = kind + data
    return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))


def png_of_size(width: int, height: int) -> bytes:
    """A PNG whose header says so and that holds no pixels."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(b"")), chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def png_with(*chunks: bytes) -> bytes:
    """A small PNG with these chunks behind its header."""
    data = encoded(Image.new("RGB", (40, 30), "red"))
    return data[:33] + b"".join(chunks) + data[33:]


def tiff_bomb(entries: int = 4000, length: int = 1 << 20) -> bytes:
    """A TIFF each of whose many entries is the whole file."""
    ifd = struct.pack("<H", entries)
    for n in range(entries):
        ifd += struct.pack("<HHII", 256 + n, 7, length, 8)
    return (b"II*\0" + struct.pack("<I", 8) + ifd + b"\0\0\0\0").ljust(length + 8, b"\0")


def exif(*entries: bytes) -> bytes:
    """EXIF of these entries of 12 bytes each."""
    ifd = struct.pack("<H", len(entries)) + b"".join(entries) + struct.pack("<I", 0)
    return b"Exif\0\0II*\0" + struct.pack("<I", 8) + ifd


ORIENTATION = struct.pack("<HHIHH", 0x0112, 3, 1, 6, 0)
"""Turn by 90 degrees."""

BROKEN = struct.pack("<HHI4s", 0x011A, 7, 4, b"abcd")
"""A resolution of bytes and not a fraction."""
