"""Pictures of merged tokens, as in figure 4 of the ToMe paper (arXiv 2210.09461)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from tome_export.inspect.colours import DARK, HATCH, HATCHES, mean_colours, outline_colours
from tome_export.inspect.groups import DROPPED, LayerGroups, MergeMap
from tome_export.inspect.svg import svg_from_groups
from tome_export.spec import PatchGrid

if TYPE_CHECKING:
    from PIL import Image

Format = Literal["png", "svg"]

PATCH_PIXELS = 14
"""Least pixels of a patch's side in a picture: below that, outlines hide what they surround."""

LONGER_SIDE = 448
"""Pixels of a picture's longer side where none are asked for."""

OUTLINE = 10
"""A patch's shorter side is this many outlines wide."""


def scale_for(grid: PatchGrid, shape: tuple[int, int], size: int = LONGER_SIDE) -> int:
    """Pixels of a picture per pixel of the image: a whole number, so that no pixel is mixed.

    Args:
        grid: How the image is cut into patches.
        shape: Height and width of the image.
        size: The picture's longer side is at least this, and less than one image more.
    """
    return max(math.ceil(PATCH_PIXELS / min(grid.height, grid.width)), math.ceil(size / max(shape)))


def draw(merge_map: MergeMap, layer: int, size: int = LONGER_SIDE) -> Image.Image:
    """Draw the tokens of one layer on the image, as pixels.

    Every token of more than one patch is filled with the mean colour of its pixels and outlined
    inside its edge; one token has one colour, wherever its patches lie. Tokens of one patch show
    the image; patches that were dropped are dark and hatched.

    Args:
        merge_map: From ``pipeline.inspect.merge_maps``.
        layer: Index of the layer, from 0; negative counts from the last.
        size: Least longer side, in pixels.

    Returns:
        An RGB image, a whole number of times as large as ``merge_map.image``.
    """
    from PIL import Image

    return Image.fromarray(pixels_from_map(merge_map, layer, size))


def draw_svg(merge_map: MergeMap, layer: int, size: int = LONGER_SIDE) -> str:
    """The same as an SVG document: the image embedded as PNG, one path per token of many patches.

    Args:
        merge_map: From ``pipeline.inspect.merge_maps``.
        layer: Index of the layer, from 0; negative counts from the last.
        size: Least longer side, in pixels, as which it is shown.
    """
    groups = merge_map.layers[layer]
    scale = scale_for(merge_map.grid, _shape(merge_map), size)
    return svg_from_groups(
        merge_map.image,
        merge_map.grid,
        groups.ids,
        mean_colours(merge_map.image, merge_map.grid, groups.ids),
        outline_colours(groups.ids),
        scale,
        outline_width(merge_map.grid, scale) / scale,
        hatching(merge_map.grid, scale)[0] / scale,
    )


def pixels_from_map(merge_map: MergeMap, layer: int, size: int = LONGER_SIDE) -> NDArray[np.uint8]:
    """The picture of ``draw`` as ``[H, W, 3]`` uint8."""
    grid, groups = merge_map.grid, merge_map.layers[layer]
    scale = scale_for(grid, _shape(merge_map), size)
    picture = merge_map.image.repeat(scale, axis=0).repeat(scale, axis=1)
    ids = groups.ids.repeat(grid.height * scale, axis=0).repeat(grid.width * scale, axis=1)
    _paint(picture[: ids.shape[0], : ids.shape[1]], ids, merge_map, groups, scale)
    return picture


def _paint(
    picture: NDArray[np.uint8],
    ids: NDArray[np.int64],
    merge_map: MergeMap,
    groups: LayerGroups,
    scale: int,
) -> None:
    """Fill and outline, in place; ``ids`` has the token of every pixel."""
    fill = mean_colours(merge_map.image, merge_map.grid, groups.ids)
    border = near_another(ids, outline_width(merge_map.grid, scale))
    for group, outline in outline_colours(groups.ids).items():
        inside = ids == group
        picture[inside] = fill[group]
        picture[inside & border] = outline
    dropped = ids == DROPPED
    picture[dropped] = DARK
    along = np.arange(ids.shape[0])[:, None] + np.arange(ids.shape[1])
    step, width = hatching(merge_map.grid, scale)
    picture[dropped & (along % step < width)] = HATCH


def hatching(grid: PatchGrid, scale: int) -> tuple[int, int]:
    """Pixels from one hatch line to the next, and of one line, along a row."""
    step = max(3, round(min(grid.height, grid.width) * scale / HATCHES))
    return step, max(1, step // 4)


def outline_width(grid: PatchGrid, scale: int) -> int:
    """Pixels of an outline."""
    return max(2, round(min(grid.height, grid.width) * scale / OUTLINE))


def near_another(ids: NDArray[np.int64], width: int) -> NDArray[np.bool_]:
    """Pixels within ``width`` of another token or of the edge: ``[H, W]`` bool."""
    outside = DROPPED - 1
    rows, cols = ids.shape
    padded = np.pad(ids, width, constant_values=outside)
    found = np.zeros(ids.shape, bool)
    for down in (-width, 0, width):
        for right in (-width, 0, width):
            y, x = width + down, width + right
            found |= padded[y : y + rows, x : x + cols] != ids
    return found


def _shape(merge_map: MergeMap) -> tuple[int, int]:
    height, width = merge_map.image.shape[:2]
    return height, width
