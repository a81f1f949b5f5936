"""Merged tokens as an SVG document: outlines along the patch grid, over the embedded image."""

from __future__ import annotations

import base64
import io

import numpy as np
from numpy.typing import NDArray

from tome_export.spec import PatchGrid
from tome_export.visualize.draw import (
    DARK,
    HATCH,
    LONGER_SIDE,
    Look,
    hex_colour,
    mean_colours,
    outline_colours,
)
from tome_export.visualize.groups import DROPPED, MergeMap

NAMESPACE = "http://www.w3.org/2000/svg"

HATCHED = "dropped"
"""Id of the pattern over dropped patches."""

Point = tuple[float, float]
Loop = list[tuple[int, int]]


def draw_svg(merge_map: MergeMap, layer: int, size: int = LONGER_SIDE) -> str:
    """The picture of ``draw.draw`` as an SVG document.

    The image is embedded as PNG; outlines lie over it, one path per token of many patches, whose
    title says how many. Patches that were dropped are one path too.

    Args:
        merge_map: From ``pipeline.inspect.merge_maps``.
        layer: Index of the layer, from 0; negative counts from the last.
        size: Least longer side, in pixels, as which it is shown.
    """
    image, grid, ids = merge_map.image, merge_map.grid, merge_map.layers[layer].ids
    height, width = image.shape[:2]
    look = Look.of(merge_map, size)
    fills, stroke = mean_colours(image, grid, ids), look.outline / look.scale
    lines = [
        f'<svg xmlns="{NAMESPACE}" viewBox="0 0 {width} {height}" '
        f'width="{width * look.scale}" height="{height * look.scale}">',
        f'<image width="{width}" height="{height}" style="image-rendering:pixelated" '
        f'href="{data_url(image)}"/>',
        *dropped_paths(ids == DROPPED, grid, look.hatch[0] / look.scale),
        f'<g stroke-width="{stroke:g}" stroke-linejoin="miter">',
    ]
    lines += [
        f'<path d="{path_around(ids == group, grid, stroke)}" fill="{hex_colour(fills[group])}" '
        f'stroke="{hex_colour(outline)}">'
        f"<title>token {group}: {int((ids == group).sum())} patches</title></path>"
        for group, outline in sorted(outline_colours(ids).items())
    ]
    return "\n".join([*lines, "</g>", "</svg>"]) + "\n"


def dropped_paths(
    mask: NDArray[np.bool_], grid: PatchGrid, hatch: float, end: str = ""
) -> list[str]:
    """The patches of which nothing is left: dark, with lines across; nothing where there are none.

    Args:
        mask: ``[rows, cols]`` bool, those patches.
        grid: How the image is cut into patches.
        hatch: From one line to the next, in pixels of the image.
        end: Of the pattern's id, where one page holds several pictures.
    """
    if not mask.any():
        return []
    return [
        f'<defs><pattern id="{HATCHED}{end}" width="{hatch:g}" height="{hatch:g}" '
        'patternUnits="userSpaceOnUse">'
        f'<rect width="{hatch:g}" height="{hatch:g}" fill="{hex_colour(DARK)}"/>'
        f'<path d="M0,{hatch:g}L{hatch:g},0" stroke="{hex_colour(HATCH)}" '
        f'stroke-width="{hatch / 5:g}"/></pattern></defs>',
        f'<path d="{path_around(mask, grid, 0)}" fill="url(#{HATCHED}{end})">'
        f"<title>dropped: {int(mask.sum())} patches</title></path>",
    ]


def path_around(mask: NDArray[np.bool_], grid: PatchGrid, stroke: float) -> str:
    """Path data of the line around a group.

    Args:
        mask: ``[rows, cols]`` bool, its patches.
        grid: How the image is cut into patches.
        stroke: Width of the line in pixels of the image.
    """
    # Strokes lie across a path: one drawn half a stroke inside stays within its patches.
    loops = (inset(loop, (grid.width, grid.height), stroke / 2) for loop in loops_from_mask(mask))
    return "".join("M" + "L".join(f"{x:g},{y:g}" for x, y in loop) + "Z" for loop in loops)


def data_url(image: NDArray[np.uint8]) -> str:
    """An image as a PNG inside a URL.

    Args:
        image: ``[H, W, 3]`` uint8.
    """
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "png", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def loops_from_mask(mask: NDArray[np.bool_]) -> list[Loop]:
    """Trace the outline of a set of patches.

    Outer edges run clockwise (y points down), edges of holes the other way, so that the inside is
    always on the right. Patches that touch at a corner only get loops of their own.

    Args:
        mask: ``[rows, cols]`` bool.

    Returns:
        Loops of corners ``(column, row)``, each corner a turn.
    """
    ahead: dict[tuple[int, int], list[tuple[int, int]]] = {}
    padded = np.pad(mask, 1)
    for row, col in np.argwhere(mask).tolist():
        around = padded[row : row + 3, col : col + 3]
        corners = ((col, row), (col + 1, row), (col + 1, row + 1), (col, row + 1))
        neighbours = (around[0, 1], around[1, 2], around[2, 1], around[1, 0])
        for side, taken in enumerate(neighbours):
            if not taken:
                ahead.setdefault(corners[side], []).append(corners[(side + 1) % 4])
    loops = []
    while ahead:
        loops.append(_loop(ahead, min(ahead)))
    return loops


def _loop(ahead: dict[tuple[int, int], list[tuple[int, int]]], start: tuple[int, int]) -> Loop:
    """Follow edges from a corner where only one loop can turn, and take them out of ``ahead``."""
    corners: Loop = []
    here, heading = start, (0, 0)
    while not corners or here != start:
        # Where four patches meet and two are in the set, a turn to the right stays at one of them.
        right = (here[0] - heading[1], here[1] + heading[0])
        ends = ahead[here]
        end = right if right in ends else ends[0]
        ends.remove(end)
        if not ends:
            del ahead[here]
        step = (end[0] - here[0], end[1] - here[1])
        if step != heading:
            corners.append(here)
        here, heading = end, step
    return corners


def inset(loop: Loop, patch: Point, by: float) -> list[Point]:
    """A loop in pixels, moved inwards.

    Args:
        loop: Corners ``(column, row)`` with the inside on the right.
        patch: Width and height of a patch in pixels.
        by: Distance in pixels; less than half a patch.
    """
    points = []
    for index, (x, y) in enumerate(loop):
        shift_x = shift_y = 0
        for (x0, y0), (x1, y1) in (
            (loop[index - 1], (x, y)),
            ((x, y), loop[(index + 1) % len(loop)]),
        ):
            shift_x -= (y1 > y0) - (y1 < y0)
            shift_y += (x1 > x0) - (x1 < x0)
        points.append((x * patch[0] + shift_x * by, y * patch[1] + shift_y * by))
    return points
