"""The parts of the server's python models that need no server."""

from __future__ import annotations

import json
import subprocess
import sys
import weakref
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from image_bombs import chunk, encoded, png_of_size, progressive, segment
from PIL import Image
from timm.data import create_transform
from video_files import write_video

from tome_export.data import best_size, decoder, headers, scores
from tome_export.data import pixels as pixels_module
from tome_export.data.pixels import BadImageError, pixels_from_bytes, pixels_from_image
from tome_export.data.preprocess import load_images
from tome_export.data.samples import sample_paths
from tome_export.models import RECIPES
from tome_export.serve.python_models import postprocess, preprocess, router
from tome_export.spec import Preprocessing
from tome_export.video import frames

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
RECIPE_CASES = [
    RECIPES["vit_digits"].preprocessing,
    RECIPES["vit_b16"].preprocessing,
    Preprocessing((3, 96, 160), MEAN, STD, 0.9, "bicubic"),
    Preprocessing((3, 90, 90), MEAN, STD, 1.1, "bilinear"),
    Preprocessing((1, 160, 96), (0.5,), (0.25,), 1.0, "nearest"),
]


def settings_of(preprocessing, max_pixels=64_000_000):
    # As they arrive: through JSON.
    return json.loads(json.dumps({**asdict(preprocessing), "max_pixels": max_pixels}))


TINY = {
    **settings_of(Preprocessing((3, 8, 8), (0.0,) * 3, (1.0,) * 3, 1.0, "bilinear")),
    "formats": pixels_module.SERVED_FORMATS,
}


def noise(shape, dtype=np.uint8):
    top = np.iinfo(dtype).max
    return np.random.default_rng(0).integers(0, top, shape, dtype, endpoint=True)


def kinds():
    """Encoded images of every kind that JPEG and PNG files come in."""
    rgb = Image.fromarray(noise((61, 47, 3)))
    exif = Image.Exif()
    exif[0x0112] = 6
    palette = rgb.quantize(16)
    deep = Image.fromarray(noise((61, 47), np.uint16))
    return {
        "rgb.png": encoded(rgb),
        "rgb.jpg": encoded(rgb, "JPEG"),
        "progressive.jpg": encoded(rgb, "JPEG", progressive=True),
        "turned.jpg": encoded(rgb, "JPEG", exif=exif),
        "turned.png": encoded(rgb, exif=exif),
        "rgba.png": encoded(Image.fromarray(noise((61, 47, 4)))),
        "grey.png": encoded(rgb.convert("L")),
        "grey.jpg": encoded(rgb.convert("L"), "JPEG"),
        "grey_alpha.png": encoded(rgb.convert("L").convert("LA")),
        "one_bit.png": encoded(rgb.convert("1")),
        "palette.png": encoded(palette),
        "palette_clear.png": encoded(palette, transparency=3),
        "rgb_clear.png": encoded(rgb, transparency=(1, 2, 3)),
        "deep.png": encoded(deep),
        "cmyk.jpg": encoded(rgb.convert("CMYK"), "JPEG"),
        "lone.png": encoded(Image.new("RGB", (1, 1), (1, 2, 3))),
    }


@pytest.mark.parametrize("p", RECIPE_CASES, ids=lambda p: f"{p.input_size}-{p.interpolation}")
def test_equals_the_recipes_loader_exactly(tmp_path, p):
    files = {path.name: path.read_bytes() for path in sample_paths()} | kinds()
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
        ours = pixels_from_bytes(data, settings_of(p))
        assert ours.dtype == np.float32
        assert ours.flags.c_contiguous
        np.testing.assert_array_equal(ours, load_images([tmp_path / name], p)[0], err_msg=name)


def test_equals_pytorchs_transform_exactly():
    p = RECIPES["vit_b16"].preprocessing
    transform = create_transform(
        p.input_size,
        interpolation=p.interpolation,
        mean=p.mean,
        std=p.std,
        crop_pct=p.crop_pct,
        crop_mode="center",
    )
    for path in sample_paths():
        expected = transform(Image.open(path).convert("RGB"))
        ours = pixels_from_bytes(path.read_bytes(), settings_of(p))
        assert torch.equal(torch.from_numpy(ours), expected), path.name


def bad_images():
    photo = sample_paths()[0].read_bytes()
    tiff = encoded(Image.new("RGB", (8, 8)), "TIFF")
    return {
        "cut.jpg": (
            photo[: len(photo) // 2],
            r"cannot be decoded \(image file is truncated",
        ),
        "cut_header.jpg": (photo[:40], "is not a JPEG or PNG|cannot be decoded"),
        "cut.png": (encoded(Image.fromarray(noise((64, 64, 3))))[:5000], "cannot be decoded"),
        "text": (b"not an image", r"is not a JPEG or PNG file \(it begins with b'not an i'\)"),
        "tiff": (tiff, "is not a JPEG or PNG file"),
        "empty": (b"", "is empty; expected the bytes of a JPEG or PNG file"),
        # No pixel is read: there are none to read in this file.
        "huge": (png_of_size(10_000, 10_000), r"is 10000 x 10000 pixels \(100.0 megapixels\)"),
        "long": (encoded(Image.new("1", (1, 60_000))), "would be resized to 8 x 480000"),
    }


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("name", bad_images())
def test_bad_images_are_named_in_one_line(name):
    data, message = bad_images()[name]
    with pytest.raises(BadImageError, match=message) as caught:
        pixels_from_bytes(data, TINY | {"max_pixels": 100_000 if name == "long" else 64_000_000})
    assert "\n" not in str(caught.value)


def test_size_limit_is_on_the_pixels():
    data = encoded(Image.new("RGB", (20, 10)))
    assert pixels_from_bytes(data, TINY | {"max_pixels": 200}).shape == (3, 8, 8)
    with pytest.raises(BadImageError, match=r"at most 0\.0 megapixels are accepted"):
        pixels_from_bytes(data, TINY | {"max_pixels": 199})


@pytest.mark.filterwarnings("ignore")
def test_damaged_files_are_decoded_or_refused():
    """Whatever a decoder raises becomes an error of that image."""
    rng = np.random.default_rng(0)
    lines = []
    for data in kinds().values():
        for _ in range(20):
            damaged = bytearray(data)
            for position in rng.integers(0, len(data), 4):
                damaged[position] = rng.integers(256)
            try:
                pixels = pixels_from_bytes(bytes(damaged), TINY | {"max_pixels": 100_000})
            except BadImageError as error:
                lines.append(str(error))
            else:
                assert pixels.shape == (3, 8, 8)
    assert len(lines) > 20
    assert not any("\n" in line for line in lines)


def test_problem_names_the_image():
    bad = BadImageError("is bad")
    problem = preprocess.error_message
    assert problem("image", [None, None]) == ""
    assert problem("image", [bad]) == "image is bad"
    assert problem("video", [None, bad, BadImageError("too")]) == "video 2 of 3 is bad"
    assert problem("image", []) == "the request holds no image; expected 1 or more"


def test_top_k_orders_by_logit_then_index():
    logits = np.array([[1, 3, 3, 0, 2], [0, 0, 0, 0, 0]], np.float32)
    index, score = scores.top_k(logits, 3)
    np.testing.assert_array_equal(index, [[1, 2, 4], [0, 1, 2]])
    assert (index.dtype, score.dtype) == (np.int32, np.float32)
    expected = torch.softmax(torch.from_numpy(logits), 1).numpy()
    np.testing.assert_allclose(score, np.take_along_axis(expected, index, 1), rtol=1e-6)


def test_top_k_of_many_equal_logits_is_by_index():
    logits = np.random.default_rng(0).integers(0, 3, (4, 1000)).astype(np.float32)
    index, _ = scores.top_k(logits, 1000)
    for row, found in zip(logits, index, strict=True):
        assert found.tolist() == sorted(range(1000), key=lambda i, row=row: (-row[i], i))


def test_top_k_of_large_logits_is_finite():
    _, score = scores.top_k(np.array([[3e38, -3e38, 0]], np.float32), 2)
    np.testing.assert_array_equal(score, [[1, 0]])


ROUTES = [
    {"model": "m8", "r": 8, "ms": 2.0},
    {"model": "m0", "r": 0, "ms": 4.0},
    {"model": "m16", "r": 16, "ms": 1.0},
    {"model": "m4", "r": 4, "ms": None},
]


@pytest.mark.parametrize(
    ("parameters", "model"),
    [
        ({}, "m0"),
        ({"unrelated": 1}, "m0"),
        ({"r": 8}, "m8"),
        ({"r": 15}, "m8"),
        ({"r": "16"}, "m16"),
        ({"r": 100}, "m16"),
        ({"r": 0}, "m0"),
        ({"r": 7.5}, "m4"),
        ({"max_ms": 4}, "m0"),
        ({"max_ms": 3.9}, "m8"),
        ({"max_ms": "1.5"}, "m16"),
        ({"max_ms": 0.1}, "m16"),
    ],
)
def test_route(parameters, model):
    assert router.chosen_route(ROUTES, parameters)["model"] == model


def test_least_merging_where_all_merge_more():
    assert router.chosen_route([r for r in ROUTES if r["r"] >= 8], {"r": 4})["model"] == "m8"


def test_fastest_is_the_measured_one_not_the_most_merging():
    routes = [{"model": "a", "r": 2, "ms": 1.0}, {"model": "b", "r": 8, "ms": 1.5}]
    assert router.chosen_route(routes, {"max_ms": 0.5})["model"] == "a"


def test_least_merging_where_nothing_was_measured():
    unmeasured = [route | {"ms": None} for route in ROUTES]
    least = min(ROUTES, key=lambda route: route["r"])["model"]
    assert router.chosen_route(unmeasured, {"max_ms": 1})["model"] == least


@pytest.mark.parametrize("name", ["r", "max_ms"])
@pytest.mark.parametrize("value", [-1, True, "fast", "nan", "inf", None, "", [], 10**400])
def test_no_number_is_refused(name, value):
    with pytest.raises(router.BadRequestError, match=rf"^{name} is .*; expected a number, 0 or mo"):
        router.chosen_route(ROUTES, {name: value})


def test_budgets_that_cannot_be_met_in_any_way_are_refused():
    with pytest.raises(router.BadRequestError, match="both r and max_ms are given"):
        router.chosen_route(ROUTES, {"r": 1, "max_ms": 1})


SERVED = [
    *(preprocess, postprocess, scores, router, pixels_module, decoder, frames),
    *(best_size, headers),
]


@pytest.mark.parametrize("module", SERVED, ids=lambda m: m.__name__)
def test_runs_where_only_numpy_and_pillow_are(module, tmp_path):
    """On a server this package, torch and everything that comes with them are not installed."""
    source = Path(module.__file__)
    (tmp_path / "model.py").write_bytes(source.read_bytes())
    code = (
        "import sys, model; tops = {name.partition('.')[0] for name in sys.modules};"
        "print(sorted(tops & {'torch', 'timm', 'tome_export', 'tritonclient', 'onnx'}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("module", "said", "settings"),
    [
        ("PIL", "has no Pillow, which decodes images; pip install pillow there", TINY),
        ("av", "has no PyAV, which decodes videos; pip install av there", {**TINY, "frames": 6}),
    ],
)
def test_a_missing_decoder_is_said(module, said, settings, tmp_path):
    folder = tmp_path / "1"
    folder.mkdir()
    for name, source in (("model", preprocess), ("decoder", decoder)):
        (folder / f"{name}.py").write_bytes(Path(source.__file__).read_bytes())
    (folder / preprocess.SETTINGS).write_text(json.dumps(settings))
    given = {"model_repository": str(tmp_path), "model_version": "1"}
    code = (
        f"import sys; sys.modules[{module!r}] = None; import model;"
        f"model.TritonPythonModel().initialize({given})"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=False
    )
    assert f"ImportError: the server's Python {said}" in done.stderr


class Watched:
    """The real preprocessing of images, which also counts those that are still held."""

    def __init__(self):
        self.shown, self.held = [], []

    def pixels_from_image(self, image, settings):
        self.shown.append(weakref.ref(image))
        self.held.append(sum(one() is not None for one in self.shown))
        return pixels_from_image(image, settings)


def test_one_whole_frame_of_a_video_is_held_at_a_time(tmp_path):
    data = write_video(tmp_path / "grey.mp4", 12).read_bytes()
    watched = Watched()
    request = {**TINY, "kind": "video", "frames": 6}
    pixels = decoder._decode(watched, frames, request, data)
    assert pixels.shape == (6, 3, 8, 8)
    assert watched.held == [1] * 6
    expected = [pixels_from_image(one, TINY) for one in frames.frames_of(data, 6)]
    np.testing.assert_array_equal(pixels, np.stack(expected))


def is_small(data, **how):
    return preprocess.is_small(data, headers.read_header(data), **how)


def test_a_small_image_is_known_by_its_header():
    """What would take long is never taken for small, whatever its bytes say first."""
    small = [encoded(Image.new("RGB", (2048, 2048)), kind) for kind in ("PNG", "JPEG")]
    large = [encoded(Image.new("L", (2048, 2049)), kind) for kind in ("PNG", "JPEG")]
    bomb = progressive(8000, 60)
    assert [is_small(data) for data in small] == [True, True]
    assert [is_small(data) for data in [*large, bomb]] == [False] * 3
    text = chunk(b"tEXt", b"size\0" + b"\0\0\0\1" * 9)
    assert not is_small(large[0][:8] + text + large[0][8:])  # its header comes later
    comments = segment(0xFE, b"") * 100_000
    assert not is_small(small[1][:2] + comments + small[1][2:])
    assert not is_small(b"\xff\xd8" + bytes(preprocess.SMALL_BYTES))
    # These are refused at once.
    assert all(is_small(data) for data in (b"", b"hello", b"\x89PN"))


def test_a_file_that_is_soon_decoded_at_a_part_of_its_size_is_small():
    phone = encoded(Image.new("L", (4096, 4096)), "JPEG")
    assert not is_small(phone)
    assert is_small(phone, scaled=True)
    assert not is_small(encoded(Image.new("L", (4096, 4097)), "JPEG"), scaled=True)
    # All coefficients of these are decoded, at whatever size.
    assert not is_small(progressive(4096, 4), scaled=True)
    many = phone + phone[phone.rindex(b"\xff\xda") :] * preprocess.SCALED_SCANS
    assert not is_small(many, scaled=True)
    assert not is_small(encoded(Image.new("L", (4096, 4096))), scaled=True)


@pytest.mark.parametrize(
    ("size", "resize", "decoded"),
    [
        # 1.5 times what it is resized to is left, and no less: 8 / 1.0 * 1.5 = 12.
        ((96, 97), "crop", (12, 13)),
        ((95, 95), "crop", (24, 24)),
        ((200, 25), "crop", (100, 13)),
        ((23, 400), "squash", (23, 400)),
        ((800, 96), "letterbox", (100, 12)),
    ],
)
def test_scaled_decoding_leaves_what_resizing_needs(size, resize, decoded, monkeypatch):
    seen = []
    keep = pixels_module.upright

    def watched(image, settings):
        seen.append(image.size)
        return keep(image, settings)

    monkeypatch.setattr(pixels_module, "upright", watched)
    data = encoded(Image.fromarray(noise((*size[::-1], 3))), "JPEG")
    settings = TINY | {"resize": resize}
    exact = pixels_from_bytes(data, settings)
    assert pixels_from_bytes(data, settings | {"scaled_decoding": True}).shape == exact.shape
    assert seen == [size, decoded]


def test_scaled_decoding_is_near_and_for_jpeg_files_only():
    recipe = settings_of(RECIPES["vit_b16"].preprocessing) | {"form": "uint8"}
    for path in sample_paths():
        photo = Image.open(path).convert("RGB").resize((1600, 1200))
        for data, near in ((encoded(photo, "JPEG", quality=90), 1.0), (encoded(photo), 0.0)):
            exact = pixels_from_bytes(data, recipe).astype(int)
            found = pixels_from_bytes(data, recipe | {"scaled_decoding": True})
            assert np.abs(found - exact).mean() <= near
