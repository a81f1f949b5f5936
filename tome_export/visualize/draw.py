"""Pictures of merged tokens: pixels, or an SVG document over the embedded image."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from tome_export.outlines import (
    DARK,
    HATCH,
    LONGER_SIDE,
    Look,
    data_url,
    dropped_paths,
    group_paths,
    mean_colours,
    outline_colours,
)
from tome_export.runtime.merge_maps import DROPPED, MergeMap

if TYPE_CHECKING:
    from PIL import Image

NAMESPACE = "http://www.w3.org/2000/svg"


def draw(merge_map: MergeMap, layer: int, size: int = LONGER_SIDE) -> Image.Image:
    """Draw the tokens of one layer on the image, as pixels.

    Every token of more than one patch is filled with the mean colour of its pixels and outlined
    inside its edge; one token has one colour, wherever its patches lie. Tokens of one patch show
    the image; patches that were dropped are dark and hatched. The RGB picture is a whole number of
    times as large as the image, its longer side at least ``size`` pixels.
    """
    from PIL import Image

    return Image.fromarray(pixels_from_map(merge_map, layer, size))


def pixels_from_map(merge_map: MergeMap, layer: int, size: int = LONGER_SIDE) -> NDArray[np.uint8]:
    """The picture of ``draw`` as ``[H, W, 3]`` uint8."""
    grid, patches, look = merge_map.grid, merge_map.layers[layer].ids, Look.of(merge_map, size)
    picture = merge_map.image.repeat(look.scale, axis=0).repeat(look.scale, axis=1)
    ids = patches.repeat(grid.height * look.scale, axis=0)
    ids = ids.repeat(grid.width * look.scale, axis=1)
    inner = picture[: ids.shape[0], : ids.shape[1]]  # a border may be left of whole patches
    fill, border = mean_colours(merge_map.image, grid, patches), near_another(ids, look.outline)
    for group, outline in outline_colours(patches).items():
        inner[ids == group] = fill[group]
        inner[(ids == group) & border] = outline
    inner[ids == DROPPED] = DARK
    along = np.arange(ids.shape[0])[:, None] + np.arange(ids.shape[1])
    step, width = look.hatch
    inner[(ids == DROPPED) & (along % step < width)] = HATCH
    return picture


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


def draw_svg(merge_map: MergeMap, layer: int, size: int = LONGER_SIDE) -> str:
    """The picture of ``draw`` as an SVG document, shown with the same size.

    The image is embedded as PNG; outlines lie over it, one path per token of many patches, whose
    title says how many. Patches that were dropped are one path too.
    """
    image, grid, ids = merge_map.image, merge_map.grid, merge_map.layers[layer].ids
    height, width = image.shape[:2]
    look = Look.of(merge_map, size)
    stroke = look.outline / look.scale
    lines = [
        f'<svg xmlns="{NAMESPACE}" viewBox="0 0 {width} {height}" '
        f'width="{width * look.scale}" height="{height * look.scale}">',
        f'<image width="{width}" height="{height}" style="image-rendering:pixelated" '
        f'href="{data_url(image)}"/>',
        *dropped_paths(ids == DROPPED, grid, look.hatch[0] / look.scale),
        f'<g stroke-width="{stroke:g}" stroke-linejoin="miter">',
    ]
    lines += [
        f'<path d="{path}" fill="{fill}" stroke="{colour}">'
        f"<title>token {group}: {int((ids == group).sum())} patches</title></path>"
        for group, (path, fill, colour) in group_paths(merge_map, layer, stroke).items()
    ]
    return "\n".join([*lines, "</g>", "</svg>"]) + "\n"
