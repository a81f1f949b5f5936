"""What headers of files say of their images, against Pillow."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from tome_export.data.headers import MOST_SEGMENTS, read_header

TYPES = {3: 2, 4: 4, 6: 1, 8: 2, 9: 4}
"""TIFF 6.0, section 2: types of whole numbers that Pillow has as numbers, and their lengths."""


def upright_size(data):
    header = read_header(data)
    return None if header is None else header.upright


def file_of(kind, orientation=None, *, xmp=False, **options):
    image, stream = Image.effect_noise((31, 17), 90), io.BytesIO()
    if orientation is not None and xmp:
        options["xmp"] = f'<x tiff:Orientation="{orientation}"/>'.encode()
        if kind == "PNG":
            from PIL.PngImagePlugin import PngInfo

            options["pnginfo"] = PngInfo()
            text = options.pop("xmp").decode()
            options["pnginfo"].add_itxt("XML:com.adobe.xmp", text)
    elif orientation is not None:
        options["exif"] = Image.Exif()
        options["exif"][0x0112] = orientation
    image.save(stream, kind, **options)
    return stream.getvalue()


def turned_size(data):
    from PIL.ImageOps import exif_transpose

    with Image.open(io.BytesIO(data)) as image:
        return exif_transpose(image).size


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize("xmp", [False, True])
@pytest.mark.parametrize("orientation", [None, *range(1, 9)])
def test_size_of_a_file_is_as_pillow_turns_it(kind, orientation, xmp):
    data = file_of(kind, orientation, xmp=xmp)
    assert upright_size(data) == turned_size(data)
    assert upright_size(data) == ((17, 31) if orientation in range(5, 9) else (31, 17))


def test_size_of_files_with_much_in_front():
    noise = np.random.default_rng(0).bytes(200_000)
    for options in ({"progressive": True}, {"icc_profile": noise}, {"comment": b"x" * 60_000}):
        assert upright_size(file_of("JPEG", 6, **options)) == (17, 31)
    data = file_of("JPEG", 6)
    assert upright_size(data[:2] + b"\xff" * 3 + data[2:]) == (17, 31)
    png = file_of("PNG", 6)
    at = png.index(b"eXIf") - 4
    end = at + 12 + int.from_bytes(png[at : at + 4], "big")
    behind = png[:at] + png[end:-12] + png[at:end] + png[-12:]
    assert upright_size(behind) == turned_size(behind) == (17, 31)
    # Motorola's byte order.
    exif = b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x08\0\0\0\0\0\0"
    segment = b"\xff\xe1" + (len(exif) + 2).to_bytes(2, "big") + exif
    data = file_of("JPEG")
    assert upright_size(data[:2] + segment + data[2:]) == (17, 31)


@pytest.mark.parametrize(("kind", "value"), TYPES.items(), ids=lambda one: str(one)[:2])
@pytest.mark.parametrize("order", ["little", "big"])
def test_orientation_may_be_of_any_type_of_whole_numbers(kind, value, order):
    """As Pillow reads it, whatever type the standard wants (EXIF 2.32, 4.6.4: SHORT)."""

    def number(n, length):
        return n.to_bytes(length, order)

    mark = {"little": b"II", "big": b"MM"}[order]
    entry = number(0x0112, 2) + number(kind, 2) + number(1, 4) + number(6, value).ljust(4, b"\0")
    exif = b"Exif\0\0" + mark + number(42, 2) + number(8, 4) + number(1, 2) + entry + bytes(4)
    segment = b"\xff\xe1" + (len(exif) + 2).to_bytes(2, "big") + exif
    data = file_of("JPEG")
    data = data[:2] + segment + data[2:]
    assert upright_size(data) == turned_size(data) == (17, 31)


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_damaged_headers_are_no_size(kind):
    data = file_of(kind, 6)
    sizes = {upright_size(data[:length]) for length in range(len(data))}
    assert sizes <= {None, (17, 31), (31, 17)}
    assert upright_size(data[:10]) is None
    rng = np.random.default_rng(0)
    for _ in range(2000):
        noisy = bytearray(data)
        for place in rng.integers(0, len(data), 8):
            noisy[place] = rng.integers(256)
        found = upright_size(bytes(noisy))
        assert found is None or min(found) >= 0
    for other in (b"", b"GIF89a", b"\xff\xd8" + b"\xff" * 50, b"\x89PNG\r\n\x1a\n"):
        assert upright_size(other) is None
    assert read_header(b"\xff\xd8" + b"\xff\xfe\0\x02" * MOST_SEGMENTS + data[2:]) is None


def test_files_that_are_decoded_part_by_part_are_told():
    assert read_header(file_of("JPEG")).baseline
    assert not read_header(file_of("JPEG", progressive=True)).baseline
    assert not read_header(file_of("PNG")).baseline
