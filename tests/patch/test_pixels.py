"""Pixels in uint8: a patched model makes of them what preprocessing makes, bit for bit."""

from __future__ import annotations

from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from video_towers import FRAMES, clip4clip, schedule

from tome_export.data.pixels import normalised as floats_of
from tome_export.errors import InputError
from tome_export.patch import patch
from tome_export.patch.pixels import normalised, pixel_shape
from tome_export.patch.precision import copy_with_dtype
from tome_export.spec import Preprocessing

RGB = Preprocessing(
    (3, 64, 64), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), 0.9, "bicubic", form="uint8"
)
GREY = replace(RGB, input_size=(1, 8, 4), mean=(0.1307,), std=(0.3081,))
FORMS = ("uint8", "uint8-nchw")


def every_value(preprocessing, *batch):
    """Pixels in a form, each of the 256 values in every channel."""
    shape = pixel_shape((*batch[1:], *preprocessing.input_size), preprocessing)
    count = int(np.prod((batch[0], *shape)))
    return (
        np.random.default_rng(0)
        .permutation(np.arange(count) % 256)
        .astype(np.uint8)
        .reshape((batch[0], *shape))
    )


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("preprocessing", "batch"),
    [(RGB, (2,)), (replace(RGB, input_size=(3, 32, 48)), (1,)), (GREY, (16,)), (RGB, (2, 3))],
    ids=["square", "wide", "grey", "video"],
)
def test_they_are_normalised_as_preprocessing_does(form, preprocessing, batch):
    preprocessing = replace(preprocessing, form=form)
    pixels = every_value(preprocessing, *batch)
    expected = floats_of(pixels, asdict(preprocessing))
    found = normalised(torch.from_numpy(pixels), preprocessing, torch.float32)
    assert found.shape == (*batch, *preprocessing.input_size)
    np.testing.assert_array_equal(found.numpy(), expected)
    half = normalised(torch.from_numpy(pixels), preprocessing, torch.float16)
    np.testing.assert_array_equal(half.numpy(), expected.astype(np.float16))  # rounded once


def test_by_the_definition():
    """``(x / 255 - mean) / std`` of one pixel, in float64."""
    pixels = np.zeros((1, 8, 4, 1), np.uint8)
    pixels[0, 5, 2, 0] = 200
    wide = normalised(torch.from_numpy(pixels), GREY, torch.float64)
    assert wide[0, 0, 5, 2].item() == pytest.approx((200 / 255 - 0.1307) / 0.3081, rel=1e-6)
    assert wide[0, 0, 2, 2].item() == pytest.approx(-0.1307 / 0.3081, rel=1e-6)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_model_computes_the_same_bit_for_bit(make_vit, form, dtype):
    preprocessing = replace(RGB, form=form)
    pixels = every_value(preprocessing, 3)
    floats = torch.from_numpy(floats_of(pixels, asdict(preprocessing)))
    model = make_vit()
    raw = copy_with_dtype(patch(model, 5, preprocessing=preprocessing, source_map=True), dtype)
    plain = copy_with_dtype(patch(model, 5, source_map=True), dtype)
    with torch.inference_mode():
        found, expected = raw(torch.from_numpy(pixels)), plain(floats.to(dtype))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert (raw.pixel_dtype, raw.pixel_shape) == (torch.uint8, pixels.shape[1:])


def test_a_video_tower_takes_frames_in_uint8():
    preprocessing = replace(RGB, input_size=(3, 32, 32))
    pixels = every_value(preprocessing, 2, FRAMES)
    floats = torch.from_numpy(floats_of(pixels, asdict(preprocessing)))
    tower, mask = clip4clip(), torch.ones(2, FRAMES)
    with torch.inference_mode():
        found = patch(tower, schedule(), preprocessing=preprocessing)(
            torch.from_numpy(pixels), mask
        )
        expected = patch(tower, schedule())(floats, mask)
    assert torch.equal(found, expected)


def test_what_does_not_fit_is_said(make_vit):
    model = patch(make_vit(), 5, preprocessing=RGB)
    pixels = torch.from_numpy(every_value(RGB, 1))
    with pytest.raises(InputError, match=r"^pixel values are float32; this model takes uint8, 0"):
        model(pixels.float())
    wanted = r"^image shape is \(3, 64, 64\); .* fixed for \(64, 64, 3\) \(height, width, channels"
    with pytest.raises(InputError, match=wanted):
        model(pixels.movedim(-1, 1))
    with pytest.raises(InputError, match=r"are uint8; this model takes floating-point numbers, no"):
        patch(make_vit(), 5)(pixels.movedim(-1, 1))
