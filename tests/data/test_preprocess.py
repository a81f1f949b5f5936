from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from timm.data import create_transform

from tome_export.data.preprocess import find_images, load_images, pixels_from_image, read_image
from tome_export.data.samples import sample_paths
from tome_export.errors import InputError
from tome_export.models import RECIPES
from tome_export.spec import Preprocessing

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
FILL = (124, 116, 104)
SIZES = [(301, 200), (200, 301), (199, 200), (33, 64), (7, 400), (90, 90)]
TINY = Preprocessing((3, 8, 8), (0.0,) * 3, (1.0,) * 3, 1.0, "bilinear")


CROP_MODES = {"crop": "center", "squash": "squash", "letterbox": "border"}


def timms(path, p):
    transform = create_transform(
        p.input_size,
        interpolation=p.interpolation,
        mean=p.mean,
        std=p.std,
        crop_pct=p.crop_pct,
        crop_mode=CROP_MODES[p.resize],
    )
    return transform(Image.open(path).convert("RGB")).numpy()


@pytest.mark.parametrize(
    "preprocessing",
    [
        RECIPES["vit_b16"].preprocessing,
        RECIPES["vit_b16_384"].preprocessing,
        RECIPES["deit3_b16"].preprocessing,
        Preprocessing((3, 224, 224), MEAN, STD, 0.875, "bilinear"),
        Preprocessing((3, 257, 257), MEAN, STD, 0.95, "bicubic"),
        Preprocessing((3, 96, 160), MEAN, STD, 0.9, "bicubic"),
        Preprocessing((3, 160, 96), MEAN, STD, 1.0, "nearest"),
        Preprocessing((3, 90, 90), MEAN, STD, 1.1, "bilinear"),
        Preprocessing((3, 96, 160), MEAN, STD, 1.0, "bicubic", "squash"),
        Preprocessing((3, 90, 90), MEAN, STD, 0.9, "bicubic", "squash"),
        Preprocessing((3, 96, 160), MEAN, STD, 1.0, "bicubic", "letterbox", FILL),
        Preprocessing((3, 90, 90), MEAN, STD, 0.9, "bilinear", "letterbox", FILL),
    ],
    ids=lambda p: f"{p.input_size}-{p.crop_pct}-{p.interpolation}-{p.resize}",
)
def test_equals_timms_transform_exactly(preprocessing):
    ours = load_images(sample_paths(), preprocessing)
    theirs = np.stack([timms(path, preprocessing) for path in sample_paths()])
    assert ours.dtype == np.float32
    np.testing.assert_array_equal(ours, theirs)


def noise(size):
    drawn = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(drawn)


@pytest.mark.parametrize("resize", CROP_MODES)
@pytest.mark.parametrize("size", SIZES)
def test_equals_timms_transform_for_odd_sizes(tmp_path, size, resize):
    noise(size).save(tmp_path / "x.png")
    p = RECIPES["deit_ti16"].preprocessing
    p = replace(p, resize=resize, fill=FILL if resize == "letterbox" else ())
    np.testing.assert_array_equal(
        load_images([tmp_path / "x.png"], p)[0], timms(tmp_path / "x.png", p)
    )


@pytest.mark.parametrize("mode", ["shortest", "longest", "squash"])
@pytest.mark.parametrize("side", [64, (48, 80)])
@pytest.mark.parametrize("size", SIZES)
def test_equals_open_clips_transform(size, side, mode):
    transform = pytest.importorskip("open_clip.transform", reason="open_clip is not installed")
    from tome_export.models.open_clip.recipes import preprocessing_of

    given = {"mean": MEAN, "std": STD, "resize_mode": mode, "fill_color": 7}
    theirs = transform.image_transform_v2(
        transform.PreprocessCfg(size=side, **given), is_train=False
    )(noise(size))
    ours = pixels_from_image(noise(size), preprocessing_of(side, given))
    np.testing.assert_array_equal(ours, theirs.numpy())


PROCESSORS = {
    "CLIP": {"size": {"shortest_edge": 70}, "crop_size": {"height": 63, "width": 63}},
    "ViT": {"size": {"height": 48, "width": 80}},
    "DeiT": {"size": {"height": 71, "width": 71}, "crop_size": {"height": 64, "width": 64}},
    "Siglip": {"size": {"height": 64, "width": 64}},
    "Bit": {"size": {"shortest_edge": 73}, "crop_size": {"height": 64, "width": 64}},
    "Llava": {"size": {"shortest_edge": 64}, "crop_size": {"height": 64, "width": 64}},
}


@pytest.mark.parametrize("name", PROCESSORS)
@pytest.mark.parametrize("size", SIZES)
def test_equals_transformers_processors(tmp_path, size, name):
    """Those that resize with Pillow: torchvision rounds otherwise, by a level at most."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    from tome_export.models.hf.checkpoint import preprocessing_of

    pads = {"do_pad": True} if name == "Llava" else {}
    cls = getattr(transformers, f"{name}ImageProcessorPil", None)
    cls = cls or getattr(transformers, f"{name}ImageProcessor")
    processor = cls(**PROCESSORS[name], **pads)
    processor.save_pretrained(tmp_path)
    family = Preprocessing((3, 64, 64), MEAN, STD, 1.0, "bicubic")
    found = preprocessing_of(tmp_path, "clip_vision_model", family, "m")[0]
    theirs = processor(noise(size), return_tensors="np")["pixel_values"][0]
    ours = pixels_from_image(noise(size), found)
    np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_a_wide_image_is_laid_in_the_middle_before_it_is_resized():
    """As in LLaVA, whose canvas has the side of the longer one; here of another shape too."""
    p = Preprocessing((3, 8, 16), (0.0,) * 3, (1.0,) * 3, 1.0, "nearest", "pad", (51, 102, 153))
    square = pixels_from_image(Image.new("RGB", (8, 8), "white"), p)
    expected = np.ones((3, 8, 16), np.float32)
    for channel, level in enumerate((0.2, 0.4, 0.6)):
        expected[channel, :, :4] = expected[channel, :, 12:] = level
    np.testing.assert_allclose(square, expected, atol=1e-6)


def test_a_canvas_that_takes_too_much_memory_is_refused():
    p = Preprocessing((3, 8, 8), (0.0,) * 3, (1.0,) * 3, 1.0, "nearest", "pad")
    with pytest.raises(InputError, match=r"is 20000 x 2 pixels, which would be padded to 20000 x"):
        pixels_from_image(Image.new("RGB", (20000, 2)), p)


def test_exif_orientation_is_applied(tmp_path):
    image = Image.open(sample_paths()[1])
    exif = Image.Exif()
    exif[0x0112] = 6
    image.rotate(90, expand=True).save(tmp_path / "turned.png", exif=exif)
    image.save(tmp_path / "upright.png")
    turned, upright = load_images([tmp_path / "turned.png", tmp_path / "upright.png"], TINY)
    np.testing.assert_array_equal(turned, upright)


def test_transparency_is_laid_on_white(tmp_path):
    # Transparent black: dropping the alpha channel would give black.
    Image.new("RGBA", (8, 8), (0, 0, 0, 0)).save(tmp_path / "rgba.png")
    Image.new("LA", (8, 8), (0, 0)).save(tmp_path / "la.png")
    palette = Image.new("P", (8, 8), 0)
    palette.putpalette([0, 0, 0] * 256)
    palette.save(tmp_path / "palette.png", transparency=0)
    for name in ("rgba.png", "la.png", "palette.png"):
        assert load_images([tmp_path / name], TINY).min() == 1.0, name


def test_grey_palette_and_cmyk(tmp_path):
    Image.new("L", (8, 8), 51).save(tmp_path / "grey.png")
    Image.new("RGB", (8, 8), (51, 51, 51)).quantize(2).save(tmp_path / "palette.png")
    Image.new("CMYK", (8, 8), (0, 0, 0, 204)).save(tmp_path / "cmyk.tif")
    for name in ("grey.png", "palette.png", "cmyk.tif"):
        np.testing.assert_allclose(load_images([tmp_path / name], TINY), 0.2, atol=1e-6)


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_sixteen_bit_grey_is_scaled_not_clipped(tmp_path, suffix):
    Image.fromarray(np.full((8, 8), 0x3380, np.uint16)).save(tmp_path / f"deep.{suffix}")
    np.testing.assert_allclose(load_images([tmp_path / f"deep.{suffix}"], TINY), 0.2, atol=1e-6)


def test_one_channel_model():
    p = RECIPES["vit_digits"].preprocessing
    assert load_images(sample_paths()[:2], p).shape == (2, 1, 32, 32)


def test_other_channel_counts_are_refused():
    p = Preprocessing((4, 8, 8), (0.0,) * 4, (1.0,) * 4, 1.0, "bilinear")
    with pytest.raises(InputError, match="takes 4 channels; images can be given to models of 1"):
        pixels_from_image(Image.new("RGB", (8, 8)), p)


def test_unreadable_images_are_named(tmp_path):
    whole = sample_paths()[0].read_bytes()
    (tmp_path / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.png").write_text("not an image")
    Image.new("F", (8, 8)).save(tmp_path / "float.tif")
    Image.fromarray(np.full((8, 8), 1 << 20, np.int32)).save(tmp_path / "wide.tif")
    (tmp_path / "empty.png").touch()
    cases = {
        "cut.jpg": "cut.jpg cannot be decoded (",
        "text.png": "text.png is not a JPEG, PNG, WEBP, GIF, BMP, PPM or TIFF file (it begins",
        "empty.png": "empty.png is empty; expected the bytes of a JPEG, PNG, WEBP",
        "float.tif": "float.tif has floating-point pixels; expected 8 or 16 bits",
        "wide.tif": "wide.tif has pixels from 1048576 to 1048576; expected 8 or 16 bits",
        "none.png": "none.png does not exist; expected an image file",
        ".": "is a folder; expected an image file",
    }
    for name, message in cases.items():
        with pytest.raises(InputError) as caught:
            read_image(tmp_path / name)
        assert message in str(caught.value)
        assert "\n" not in str(caught.value)


def test_no_images_are_refused():
    with pytest.raises(InputError, match="no images given"):
        load_images([], TINY)


def test_find_images(tmp_path):
    (tmp_path / "b").mkdir()
    for name in ("b/2.JPG", "1.png", "b/notes.txt"):
        (tmp_path / name).touch()
    assert find_images(tmp_path) == [tmp_path / "1.png", tmp_path / "b" / "2.JPG"]
    assert find_images(tmp_path / "1.png") == [tmp_path / "1.png"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"no images under .*empty; expected files ending in"):
        find_images(tmp_path / "empty")
    with pytest.raises(InputError, match=r"nowhere does not exist"):
        find_images(tmp_path / "nowhere")
