"""Artifacts that take an image's own pixels: those of floats, of the same images, bit for bit."""

from __future__ import annotations

import functools
from dataclasses import replace

import numpy as np
import pytest

import tome_export
from tome_export.build import BuildRequest, build
from tome_export.data.images import load_inputs
from tome_export.data.preprocess import load_images
from tome_export.data.samples import sample_paths
from tome_export.errors import InputError
from tome_export.merge.schedule import Schedule
from tome_export.runtime.merge_maps import merge_maps
from tome_export.spec import BatchRange

PHOTOGRAPHS = [str(path) for path in sample_paths()[:3]]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """``made(form, precision)``: an artifact of colours, 160 pixels; each is built once."""
    folder = tmp_path_factory.mktemp("raw")

    @functools.cache
    def get(form, precision):
        return build(
            BuildRequest(
                "timm:test_vit",
                folder / f"{form}-{precision}",
                weights="random",
                schedule=Schedule(9),
                precision=precision,
                batch=BatchRange(1, 3, 4),
                engine="none",
                check=form != "float32",
                input=form,
            )
        )

    return lambda form, precision="fp32": get(form, precision)


@pytest.mark.parametrize(
    ("form", "precision"),
    [
        ("uint8", "fp32"),
        ("uint8", "fp16"),
        pytest.param("uint8-nchw", "fp32", marks=pytest.mark.slow),
        pytest.param("uint8", "bf16", marks=pytest.mark.slow),
    ],
)
def test_photographs_give_the_same_numbers(made, form, precision):
    raw, plain = made(form, precision), made("float32", precision)
    assert raw.manifest.parity.passed
    assert raw.manifest.parity.defects == 0
    found = []
    for one in (raw, plain):
        with tome_export.load(one.path) as model:
            found.append(model(PHOTOGRAPHS).values)
    np.testing.assert_array_equal(*found)


def test_a_quarter_of_the_bytes_goes_in(made):
    manifest, plain = made("uint8").manifest, made("float32").manifest
    assert (manifest.input.dtype, manifest.input.shape) == ("uint8", ("batch", 160, 160, 3))
    assert manifest.preprocessing == replace(plain.preprocessing, form="uint8")
    pixels, floats = (load_inputs(one, PHOTOGRAPHS) for one in (manifest, plain))
    assert 4 * pixels.nbytes == floats.nbytes
    channels_first = replace(manifest.preprocessing, form="uint8-nchw")
    moved = load_images(PHOTOGRAPHS, channels_first)
    np.testing.assert_array_equal(moved, np.moveaxis(pixels, -1, -3))
    assert channels_first.pixel_shape == moved.shape[1:]


def test_pictures_are_those_of_floats(made):
    found, expected = (merge_maps(made(form), PHOTOGRAPHS) for form in ("uint8", "float32"))
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one.image, other.image)
        np.testing.assert_array_equal(one.layers[-1].ids, other.layers[-1].ids)


def refusal(artifact, pixels):
    with tome_export.load(artifact.path) as model, pytest.raises(InputError) as error:
        model.run(pixels)
    return str(error.value)


def test_wrong_pixels_are_one_line(made):
    raw, pixels = made("uint8"), np.zeros((2, 160, 160, 3), np.uint8)
    expected = "the model takes uint8 ['batch', 160, 160, 3] (height, width, channels): "
    assert refusal(raw, pixels.astype(np.float32)) == (
        f"pixel_values are float32 [2, 160, 160, 3]; {expected}give an image's own pixels, 0 to "
        "255: the model scales and normalises them itself"
    )
    channels_first = np.moveaxis(pixels, -1, -3)
    assert refusal(raw, channels_first) == (
        f"pixel_values are uint8 [2, 3, 160, 160]; {expected}move the channels with "
        "numpy.moveaxis(pixel_values, -3, -1)"
    )
    assert f"uint8 [2, 32, 160, 3]; {expected}give pixels of that size" in refusal(
        raw, pixels[:, :32]
    )
    assert refusal(raw, pixels[0]).endswith("put the batch in front, pixel_values[None]")
    plain = made("float32")
    moved = refusal(plain, pixels.astype(np.float32))
    assert moved.endswith("the channels with numpy.moveaxis(pixel_values, -1, -3)")
    assert "build with --input uint8" in refusal(plain, channels_first)
    assert refusal(plain, channels_first.astype(np.float64)).endswith(".astype(numpy.float32)")
