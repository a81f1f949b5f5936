"""The pictures, pixel by pixel and path by path."""

from __future__ import annotations

import base64
import io
import re
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from tome_export.outlines import (
    Look,
    hex_colour,
    inset,
    loops_from_mask,
    mean_colours,
    outline_colours,
)
from tome_export.runtime.merge_maps import LayerGroups, MergeMap
from tome_export.spec import PatchGrid
from tome_export.visualize.draw import NAMESPACE, draw, draw_svg, pixels_from_map

IDS = np.array(
    [
        [0, 1, 1, 2],
        [1, 1, 3, 3],
        [4, 5, 3, 6],
    ]
)
"""Group 1 of four patches, 3 of three, the rest single."""


def merge_map(ids=IDS, patch=(4, 5), border=(0, 0)):
    grid = PatchGrid(*ids.shape, *patch)
    shape = (grid.rows * patch[0] + border[0], grid.cols * patch[1] + border[1], 3)
    image = np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)
    return MergeMap(image, grid, (LayerGroups(0, len(np.unique(ids)), ids, 0),))


@pytest.mark.parametrize("border", [(0, 0), (3, 2)])
def test_every_pixel_is_fill_outline_or_image(border):
    found = merge_map(border=border)
    look = Look.of(found, 60)
    scale, width = look.scale, look.outline
    assert scale == 4  # 14 pixels for the four of a patch
    picture = pixels_from_map(found, 0, 60)
    assert picture.shape == (found.image.shape[0] * scale, found.image.shape[1] * scale, 3)
    fills = mean_colours(found.image, found.grid, IDS)
    outlines = outline_colours(IDS)
    assert width == 2
    shown = found.image.repeat(scale, axis=0).repeat(scale, axis=1)
    high, wide = found.grid.height * scale, found.grid.width * scale
    # Slow and obvious: whose is each pixel, and is another group within an outline's width?
    for y in range(picture.shape[0]):
        for x in range(picture.shape[1]):
            if y >= IDS.shape[0] * high or x >= IDS.shape[1] * wide:
                expected = shown[y, x]
            else:
                group = IDS[y // high, x // wide]
                around = {
                    IDS[v // high, u // wide]
                    if 0 <= v < IDS.shape[0] * high and 0 <= u < IDS.shape[1] * wide
                    else -1
                    for v in (y - width, y, y + width)
                    for u in (x - width, x, x + width)
                }
                expected = shown[y, x]
                if group in outlines:
                    expected = fills[group] if around == {group} else outlines[group]
            assert tuple(picture[y, x]) == tuple(expected), (y, x)


def test_a_picture_is_an_rgb_image_of_at_least_the_size_asked_for():
    found = merge_map(patch=(16, 16))
    picture = draw(found, 0, 200)
    assert picture.mode == "RGB"
    assert picture.size == (256, 192)
    np.testing.assert_array_equal(np.asarray(picture), pixels_from_map(found, -1, 200))


@pytest.mark.parametrize(
    ("patch", "size", "scale"), [(4, 1, 4), (16, 1, 1), (16, 448, 7), (14, 64, 2), (1, 1, 14)]
)
def test_patches_are_never_too_small_to_see(patch, size, scale):
    assert Look.of(merge_map(patch=(patch, patch)), size).scale == scale


def test_nothing_merged_leaves_the_image_as_it_is():
    found = merge_map(ids=np.arange(12).reshape(3, 4))
    scale = Look.of(found).scale
    shown = found.image.repeat(scale, axis=0).repeat(scale, axis=1)
    np.testing.assert_array_equal(pixels_from_map(found, 0), shown)


def test_svg_has_the_image_and_one_path_per_group():
    found = merge_map(border=(1, 2))
    scale = Look.of(found).scale
    root = ElementTree.fromstring(draw_svg(found, 0))  # noqa: S314 (made here)
    height, width = found.image.shape[:2]
    assert root.get("viewBox") == f"0 0 {width} {height}"
    assert (root.get("width"), root.get("height")) == (str(width * scale), str(height * scale))
    href = root.find(f"{{{NAMESPACE}}}image").get("href")
    content = base64.b64decode(href.removeprefix("data:image/png;base64,"))
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(content))), found.image)
    paths = root.findall(f".//{{{NAMESPACE}}}path")
    fills = mean_colours(found.image, found.grid, IDS)
    outlines = outline_colours(IDS)
    assert [(p.get("fill"), p.get("stroke")) for p in paths] == [
        (hex_colour(fills[group]), hex_colour(outlines[group])) for group in (1, 3)
    ]
    assert [p[0].text for p in paths] == ["token 1: 4 patches", "token 3: 3 patches"]


def test_svg_outlines_surround_the_patches_of_their_group():
    """Painted by the even-odd rule at the patches' centres, the paths give the groups back."""
    ids = np.random.default_rng(3).integers(0, 6, (9, 11))
    found = merge_map(ids=ids, patch=(6, 4))
    root = ElementTree.fromstring(draw_svg(found, 0))  # noqa: S314 (made here)
    paths = root.findall(f".//{{{NAMESPACE}}}path")
    assert len(paths) == 6
    for path in paths:
        group = int(path[0].text.split()[1].rstrip(":"))
        polygons = [
            [tuple(map(float, point.split(","))) for point in loop.split("L")]
            for loop in re.findall(r"M([^Z]*)Z", path.get("d"))
        ]
        inside = [
            [
                sum(is_right_of(x * 4 + 2, y * 6 + 3, polygon) for polygon in polygons) % 2 == 1
                for x in range(11)
            ]
            for y in range(9)
        ]
        np.testing.assert_array_equal(np.array(inside), ids == group)


def is_right_of(x, y, polygon):
    """Whether a ray to the left meets the polygon an odd number of times."""
    crossings = 0
    for (x0, y0), (x1, y1) in zip(polygon, polygon[1:] + polygon[:1], strict=True):
        crossings += (y0 > y) != (y1 > y) and min(x0, x1) < x
    return crossings % 2 == 1


def test_outlines_of_holes_and_corners():
    ring = np.array([[1, 1, 1], [1, 0, 1], [1, 1, 1]], bool)
    outer, hole = loops_from_mask(ring)
    assert outer == [(0, 0), (3, 0), (3, 3), (0, 3)]
    assert {*hole} == {(1, 1), (2, 1), (2, 2), (1, 2)}
    corners = np.array([[1, 0], [0, 1]], bool)
    assert [len(loop) for loop in loops_from_mask(corners)] == [4, 4]
    assert loops_from_mask(np.zeros((2, 2), bool)) == []


def test_outlines_are_moved_to_the_inside():
    bent = np.array([[1, 0], [1, 1]], bool)
    (loop,) = loops_from_mask(bent)
    assert loop == [(0, 0), (1, 0), (1, 1), (2, 1), (2, 2), (0, 2)]
    assert inset(loop, (10, 20), 1) == [(1, 1), (9, 1), (9, 21), (19, 21), (19, 39), (1, 39)]
    outer, hole = loops_from_mask(np.pad(np.zeros((1, 1), bool), 1, constant_values=True))
    assert inset(outer, (10, 10), 2)[0] == (2, 2)
    assert {*inset(hole, (10, 10), 2)} == {(8, 8), (22, 8), (22, 22), (8, 22)}
