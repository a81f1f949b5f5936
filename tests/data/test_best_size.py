"""The rule that chooses an image size, against counting pixels; sizes of files, against Pillow."""

from __future__ import annotations

import io
import itertools

import numpy as np
import pytest
from PIL import Image

from tome_export.data.best_size import best_size, upright_size, waste

SIZES = [(8, 8), (16, 16), (16, 8), (8, 16), (24, 8)]


def counted_waste(image, size, crop_pct, resize, cells=48):
    """``waste`` by laying a grid of points over the image and one over the input."""
    (width, height), (rows, cols) = image, size
    across, down = cols / crop_pct / width, rows / crop_pct / height
    if resize == "crop":
        across = down = max(across, down)
    elif resize in ("pad", "letterbox"):
        across = down = min(across, down)
    x = (np.arange(cells) + 0.5) / cells
    # Points of the image, as they lie on the input.
    on_x, on_y = (x - 0.5) * width * across, (x - 0.5) * height * down
    seen = np.outer(abs(on_y) <= rows / 2, abs(on_x) <= cols / 2).mean()
    # Points of the input, as they lie on the image.
    of_x, of_y = (x - 0.5) * cols / across, (x - 0.5) * rows / down
    covered = np.outer(abs(of_y) <= height / 2, abs(of_x) <= width / 2).mean()
    # Of a part that both see: pixels of the one, pixels of the other.
    part = min(width * across, cols) * min(height * down, rows)
    pixels = sorted([part, part / (across * down)])
    squeezed = min(across / down, down / across)
    return (1 - seen) + (1 - covered) + (1 - pixels[0] / pixels[1]) + (1 - squeezed)


@pytest.mark.parametrize("resize", ["crop", "squash", "pad", "letterbox"])
@pytest.mark.parametrize("crop_pct", [0.875, 1.0, 1.25])
def test_every_small_image_gets_the_size_that_counting_says(resize, crop_pct):
    """Points are 1/48 apart each way: sizes whose counts are that near may be told either way."""
    for image in itertools.product(range(1, 41, 3), range(1, 41, 3)):
        counts = {size: counted_waste(image, size, crop_pct, resize) for size in SIZES}
        for size, count in counts.items():
            assert waste(image, size, crop_pct, resize) == pytest.approx(count, abs=0.09)
        chosen = best_size(image, SIZES, crop_pct, resize)
        assert counts[chosen] <= min(counts.values()) + 0.09
        wastes = {size: waste(image, size, crop_pct, resize) for size in SIZES}
        assert wastes[chosen] == pytest.approx(min(wastes.values()), abs=1e-9)


@pytest.mark.parametrize(
    ("image", "chosen"),
    [
        ((224, 224), (224, 224)),
        ((448, 448), (448, 448)),
        ((100, 100), (224, 224)),  # less is invented
        ((4000, 4000), (448, 448)),  # less is lost to shrinking
        ((316, 316), (224, 224)),  # the geometric mean is 316.8
        ((318, 318), (448, 448)),
        ((224, 448), (448, 224)),
        ((448, 224), (224, 448)),
        ((6000, 3000), (224, 448)),  # cutting half of it away would waste more than shrinking it
        ((3000, 6000), (448, 224)),
        ((20, 40), (448, 224)),
    ],
)
def test_what_users_would_choose(image, chosen):
    sizes = [(224, 224), (448, 448), (448, 224), (224, 448)]
    assert best_size(image, sizes) == chosen


def test_of_equal_sizes_the_one_of_fewest_pixels_then_the_lower():
    assert best_size((100, 100), [(448, 224), (224, 448)]) == (224, 448)
    # Both are border and image in equal parts, at a scale of 2 and 1/2.
    one = {"crop_pct": 1.0, "resize": "letterbox"}
    assert waste((8, 8), (16, 32), **one) == waste((8, 8), (4, 8), **one)
    assert best_size((8, 8), [(16, 32), (4, 8)], **one) == (4, 8)


@pytest.mark.parametrize("resize", ["crop", "squash", "pad", "letterbox"])
def test_nothing_is_wasted_of_an_image_of_the_very_size(resize):
    for size in SIZES:
        assert waste(size[::-1], size, 1.0, resize) == 0
        assert best_size(size[::-1], SIZES, 1.0, resize) == size


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
