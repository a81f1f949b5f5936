"""What one image may cost, whoever decodes it; whatever a file holds is pixels or one line."""

from __future__ import annotations

import re
import signal
import struct
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from image_bombs import (
    BROKEN,
    ORIENTATION,
    chunk,
    encoded,
    exif,
    png_of_size,
    png_with,
    progressive,
    segment,
    tiff_bomb,
)
from PIL import Image, features

from tome_export.data import decoder as decoding
from tome_export.data import pixels as pixels_module
from tome_export.data.decoder import DecodeError, Decoder
from tome_export.data.pixels import FORMATS, MAX_SCANS, SERVED_FORMATS, scans
from tome_export.data.preprocess import load_images, read_image
from tome_export.data.samples import sample_paths
from tome_export.errors import InputError
from tome_export.spec import Preprocessing

TINY = {
    "input_size": [3, 8, 8],
    "mean": [0.0] * 3,
    "std": [1.0] * 3,
    "crop_pct": 1.0,
    "resize": "crop",
    "fill": (),
    "crop_offset": "round",
    "interpolation": "bilinear",
}
PIXELS = Path(pixels_module.__file__)


@pytest.fixture(scope="module")
def decoder():
    made = Decoder(PIXELS)
    yield made
    made.close()


def memory_mb(made: Decoder) -> float:
    """Most memory that the process of a decoder has had."""
    status = Path(f"/proc/{made.start()[1].pid}/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) / 1000


def webp_of_size(side: int, *, extended: bool) -> bytes:
    """A WebP file whose header says so, of either container."""
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue")]
    if extended:
        data = encoded(frames[0], "WEBP", save_all=True, append_images=frames[1:])
        at = data.index(b"VP8X") + 12
        return data[:at] + (side - 1).to_bytes(3, "little") * 2 + data[at + 6 :]
    data = encoded(frames[0], "WEBP", lossless=True)
    at = data.index(b"VP8L") + 9
    bits = int.from_bytes(data[at : at + 4], "little") >> 28 << 28 | side - 1 | side - 1 << 14
    return data[:at] + bits.to_bytes(4, "little") + data[at + 4 :]


def tiled_tiff() -> bytes:
    """A TIFF of one compressed tile of 2^20 x 2^20 pixels."""
    values = {256: 70, 257: 70, 258: 8, 259: 5, 262: 1, 277: 1}
    values |= {322: 1 << 20, 323: 1 << 20, 324: 200, 325: 100}
    ifd = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in values.items())
    return b"II*\0" + struct.pack("<IH", 8, len(values)) + ifd + bytes(4096)


ZEROS = zlib.compress(b"\0" * 2_000_000)
BOMBS = {
    "many scans": (progressive(64, MAX_SCANS), "is a JPEG file of more than 64 scans; save it ane"),
    "header": (png_of_size(10_000, 10_000), r"is 10000 x 10000 pixels \(100.0 megapixels\); at mo"),
    "beyond Pillow's limit": (png_of_size(60_000, 60_000), r"is 60000 x 60000 pixels \(3600.0 meg"),
    "one row": (encoded(Image.new("L", (3_000_000, 1))), "is 3000000 x 1 pixels, .* whose sides d"),
    "webp": (webp_of_size(16_383, extended=False), r"is 16383 x 16383 pixels \(268.4 meg"),
    "extended webp": (webp_of_size(16_383, extended=True), "is 16383 x 16383 pixels"),
    "tile": (tiled_tiff(), "takes more memory to decode than is allowed"),
    "text": (
        png_with(chunk(b"zTXt", b"key\0\0" + ZEROS)),
        "has more text or a larger colour profi",
    ),
    "profile": (png_with(chunk(b"iCCP", b"key\0\0" + ZEROS)), "has more text or a larger colour p"),
    "entries": (tiff_bomb(), "it begins as a TIFF file and has no valid header"),
    "postscript": (
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
        "is not a JPEG, PNG, WEBP",
    ),
    "another format": (encoded(Image.new("RGB", (8, 8)), "DDS"), r"\(it begins with b'DDS "),
    "a whole header": (encoded(Image.new("RGB", (8, 8)))[:30], "cannot be decoded .* damaged or c"),
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_is_one_line_that_is_true(decoder, name):
    data, message = BOMBS[name]
    with pytest.raises(DecodeError, match=message) as caught:
        decoder("pixels", data, TINY)
    assert "\n" not in str(caught.value)
    assert ("damaged" in str(caught.value)) == (name in ("entries", "a whole header"))
    assert memory_mb(decoder) < 150


def test_scans_are_those_of_the_image_itself():
    """And not those of a preview inside its metadata, or of what lies behind its end."""
    plain = encoded(Image.open(sample_paths()[0]), "JPEG", progressive=True)
    count = scans(plain)
    assert 2 < count < 20
    assert scans(plain[:2] + segment(0xE1, plain[:60_000]) + plain[2:] + plain * 99) == count
    assert scans(progressive(64, 7)) == 8
    assert scans(progressive(64, 7000)) == MAX_SCANS + 1


def test_a_picture_of_16_bits_takes_few_bytes_of_each_pixel():
    made = Decoder(PIXELS)
    before = memory_mb(made)
    side = 3000
    deep = encoded(Image.fromarray(np.full((side, side), 0x3380, np.uint16)))
    np.testing.assert_allclose(made("pixels", deep, TINY), 0.2, atol=1e-6)
    assert (memory_mb(made) - before) * 1e6 < 12 * side**2
    made.close()


def test_time_of_one_image_is_limited():
    """The next image is decoded all the same, by another process."""
    slow = Decoder(PIXELS, seconds={"pixels": 1})
    began = time.monotonic()
    with pytest.raises(DecodeError, match=r"^takes more than 1 s to decode; give a smaller or sim"):
        slow("pixels", PLAIN_TEXT, TINY)
    assert time.monotonic() - began < 30
    assert slow("pixels", encoded(Image.new("RGB", (8, 8))), TINY).shape == (3, 8, 8)
    slow.close()


PLAIN_TEXT = b"P3 2000 2000 255\n" + b"1 " * 12_000_000
"""A picture in words, which Pillow reads in Python, byte by byte."""


@pytest.mark.parametrize("exit_signal", [signal.SIGSEGV, signal.SIGKILL])
def test_a_decoder_that_dies_takes_one_image_along(tmp_path, exit_signal):
    deadly = tmp_path / "pixels.py"
    deadly.write_text(
        PIXELS.read_text().replace(
            "    names = _names(",
            f"    if data == b'die': import os; os.kill(os.getpid(), {int(exit_signal)})\n"
            "    names = _names(",
            1,
        )
    )
    made = Decoder(deadly)
    with pytest.raises(DecodeError, match=f"^{decoding.DIED}$"):
        made("pixels", b"die", TINY)
    assert made("pixels", encoded(Image.new("RGB", (8, 8))), TINY).shape == (3, 8, 8)
    made.close()


def test_memory_of_one_image_is_limited(tmp_path):
    greedy = tmp_path / "pixels.py"
    greedy.write_text(
        PIXELS.read_text().replace(
            "    names = _names(", "    held = bytearray(1 << 31)\n    names = _names(", 1
        )
    )
    made = Decoder(greedy)
    with pytest.raises(DecodeError, match=r"^takes more memory to decode than is allowed; give a"):
        made("pixels", b"x", TINY)
    made.close()


def test_a_broken_value_of_exif_leaves_the_orientation(tmp_path):
    whole, broken = (tmp_path / name for name in ("whole.jpg", "broken.jpg"))
    photo = Image.open(sample_paths()[1])
    photo.save(whole, exif=exif(ORIENTATION))
    photo.save(broken, exif=exif(ORIENTATION, BROKEN))
    assert read_image(broken).size == photo.size[::-1]
    np.testing.assert_array_equal(np.asarray(read_image(broken)), np.asarray(read_image(whole)))


@pytest.mark.parametrize("data", [b"", b"II*\0", b"garbage", exif(ORIENTATION)[6:20], b"\xff" * 99])
def test_exif_that_cannot_be_read_turns_nothing(tmp_path, data):
    photo = Image.open(sample_paths()[1])
    photo.save(tmp_path / "x.jpg", exif=b"Exif\0\0" + data)
    assert read_image(tmp_path / "x.jpg").size == photo.size


def test_every_format_that_is_promised_is_read(tmp_path):
    photo = Image.open(sample_paths()[0])
    for kind in FORMATS:
        path = tmp_path / f"x.{kind.lower()}"
        photo.save(path, kind)
        assert read_image(path).size == photo.size, kind


def test_no_other_format_is_opened(tmp_path):
    """Neither by a name nor by its content, whatever Pillow can read besides."""
    others = ["DDS", "EPS", "FITS", "ICNS", "ICO", "JPEG2000", "PCX", "PSD", "SGI", "TGA"]
    others += ["AVIF"] if features.check("avif") else []
    Image.init()
    for kind in [name for name in others if name in Image.SAVE]:
        path = tmp_path / "x.png"
        Image.new("RGB", (64, 64)).save(path, kind)
        with pytest.raises(InputError, match=r"x\.png is not a JPEG, PNG, WEBP, GIF, BMP, PPM or"):
            read_image(path)


def test_a_client_refuses_what_its_server_does(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "x.webp")
    with pytest.raises(
        InputError, match=r"x\.webp is not a JPEG or PNG file \(it begins with b'RIFF"
    ):
        read_image(tmp_path / "x.webp", SERVED_FORMATS)


def test_the_first_of_many_frames_is_taken(tmp_path):
    frames = [Image.new("RGB", (16, 16), (n, 0, 0)) for n in range(250)]
    for kind in ("GIF", "PNG", "WEBP", "TIFF"):
        path = tmp_path / f"x.{kind.lower()}"
        extra = {"lossless": True} if kind == "WEBP" else {}
        frames[0].save(path, kind, save_all=True, append_images=frames[1:], **extra)
        assert np.asarray(read_image(path)).max() == 0, kind


@pytest.mark.parametrize("name", BOMBS)
def test_commands_say_the_same(tmp_path, name):
    path = tmp_path / "bomb.png"
    path.write_bytes(BOMBS[name][0])
    preprocessing = Preprocessing((3, 8, 8), (0.0,) * 3, (1.0,) * 3, 1.0, "bilinear")
    with pytest.raises(InputError, match=f"^image {path} .*{BOMBS[name][1]}"):
        load_images([path], preprocessing)


def valid_files() -> dict[str, bytes]:
    """Small files of each format, with what its readers have most code for."""
    rgb = Image.fromarray(np.random.default_rng(0).integers(0, 256, (23, 17, 3), np.uint8))
    deep = Image.fromarray(np.arange(400, dtype=np.uint16).reshape(20, 20) * 150)
    palette = rgb.quantize(16)
    turned = exif(ORIENTATION, BROKEN)
    frames = {"save_all": True, "append_images": [rgb.rotate(90), rgb.rotate(180)]}
    return {
        "jpg": encoded(rgb, "JPEG", exif=turned),
        "progressive.jpg": encoded(rgb, "JPEG", progressive=True),
        "cmyk.jpg": encoded(rgb.convert("CMYK"), "JPEG"),
        "mpo.jpg": encoded(rgb, "MPO", **frames),
        "png": encoded(rgb, exif=turned[6:]),
        "palette.png": encoded(palette, transparency=3),
        "deep.png": encoded(deep),
        "frames.png": encoded(rgb, **frames),
        "webp": encoded(rgb, "WEBP", exif=turned),
        "lossless.webp": encoded(rgb.convert("RGBA"), "WEBP", lossless=True),
        "frames.webp": encoded(rgb, "WEBP", **frames),
        "gif": encoded(palette, "GIF"),
        "frames.gif": encoded(rgb, "GIF", **frames),
        "bmp": encoded(rgb, "BMP"),
        "rle.bmp": rle_bitmap(),
        "ppm": encoded(rgb, "PPM"),
        "plain.ppm": b"P3 2 2 255\n" + b"1 2 3 " * 4,
        "tif": encoded(rgb, "TIFF"),
        "lzw.tif": encoded(rgb, "TIFF", compression="tiff_lzw"),
        "jpeg.tif": encoded(rgb, "TIFF", compression="jpeg"),
        "deflate.tif": encoded(deep, "TIFF", compression="tiff_adobe_deflate"),
        "fax.tif": encoded(rgb.convert("1"), "TIFF", compression="group4"),
        "frames.tif": encoded(rgb, "TIFF", **frames),
    }


def rle_bitmap() -> bytes:
    """A bitmap of 256 colours, in runs."""
    rows = (b"\x08\x01" + b"\0\0") * 8 + b"\0\1"
    palette = bytes(range(256)) * 4
    offset = 14 + 40 + len(palette)
    header = struct.pack("<2sIHHI", b"BM", offset + len(rows), 0, 0, offset)
    info = struct.pack("<IiiHHIIiiII", 40, 8, 8, 1, 8, 1, len(rows), 0, 0, 256, 0)
    return header + info + palette + rows


VALID = valid_files()


@st.composite
def mutated(draw: st.DrawFn) -> bytes:
    """A valid file with some bytes changed, put in, taken out, doubled, or cut off."""
    data = bytearray(draw(st.sampled_from(list(VALID.values()))))
    for _ in range(draw(st.integers(0, 6))):
        at = draw(st.integers(0, max(0, len(data) - 1)) | st.integers(0, min(96, len(data))))
        size = draw(st.integers(1, 8))
        what = draw(st.sampled_from(["change", "extreme", "insert", "remove", "double", "cut"]))
        if what == "change":
            data[at : at + size] = draw(st.binary(min_size=size, max_size=size))
        elif what == "extreme":
            data[at : at + size] = draw(st.sampled_from([b"\xff", b"\0", b"\x7f", b"\x80"])) * size
        elif what == "insert":
            data[at:at] = draw(st.binary(min_size=1, max_size=64))
        elif what == "remove":
            del data[at : at + size]
        elif what == "double":
            data[at:at] = data[at : at + 64]
        else:
            del data[at:]
    return bytes(data)


@settings(
    max_examples=150,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)
@given(data=mutated())
def test_whatever_a_file_holds_is_pixels_or_one_line(decoder, data):
    check_one(decoder, data)


def check_one(made: Decoder, data: bytes) -> None:
    process = made.start()[1]
    line = ""
    try:
        found = made("pixels", data, TINY)
    except DecodeError as error:
        line = str(error)
    else:
        assert found.shape == (3, 8, 8)
    assert line != decoding.DIED
    assert "\n" not in line
    assert len(line) < 400
    assert made.start()[1] is process, "it took too long"
    assert memory_mb(made) < 900


@pytest.mark.parametrize("name", VALID)
def test_the_files_that_are_changed_are_valid(decoder, name):
    assert decoder("pixels", VALID[name], TINY).shape == (3, 8, 8)
