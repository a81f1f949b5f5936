"""The rule that chooses an image size, against counting points."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from tome_export.data.best_size import best_size, waste

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
    resampled = 1 - np.sqrt(pixels[0] / pixels[1])
    return (1 - seen) + (1 - covered) + (1 - squeezed) + 0.3 * resampled


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


@pytest.mark.parametrize(
    ("image", "chosen"),
    [
        ((500, 500), (224, 224)),  # all of it is seen, where a larger size would see half
        ((640, 480), (224, 224)),  # three quarters, where the others see two thirds or less
        ((480, 640), (224, 224)),
        ((1200, 800), (224, 448)),
        ((800, 1200), (448, 224)),
        ((4000, 3000), (224, 224)),
    ],
)
def test_more_pixels_are_no_reason_to_cut_the_image(image, chosen):
    assert best_size(image, [(224, 224), (448, 224), (224, 448)]) == chosen


def test_a_sliver_is_no_reason_to_shrink_an_image_to_half():
    assert best_size((1000, 1000), [(224, 224), (448, 432)]) == (448, 432)


@pytest.mark.parametrize("resize", ["crop", "squash", "pad", "letterbox"])
def test_no_image_that_lies_goes_to_a_size_that_stands(resize):
    sizes = [(224, 224), (448, 224), (224, 448)]
    for width, height in itertools.combinations(range(40, 4000, 173), 2):
        lying = max(width, height), min(width, height)
        assert best_size(lying, sizes, resize=resize) != (448, 224)
        assert best_size(lying[::-1], sizes, resize=resize) != (224, 448)


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
