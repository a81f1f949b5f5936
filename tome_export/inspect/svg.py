"""Merged tokens as an SVG document, written by hand."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from tome_export.inspect.colours import DARK, HATCH, Colour, hex_colour
from tome_export.inspect.groups import DROPPED
from tome_export.inspect.outline import inset, loops_from_mask
from tome_export.spec import PatchGrid

NAMESPACE = "http://www.w3.org/2000/svg"

HATCHED = "dropped"
"""Id of the pattern over dropped patches."""


def svg_from_groups(
    image: NDArray[np.uint8],
    grid: PatchGrid,
    ids: NDArray[np.int64],
    fills: Mapping[int, Colour],
    outlines: Mapping[int, Colour],
    scale: int,
    stroke: float,
    hatch: float,
) -> str:
    """Outlines over the image; one path per group, its title saying how many patches it has.

    Patches that were dropped are one path too, dark and hatched.

    Args:
        image: ``[H, W, 3]`` uint8.
        grid: How it is cut into patches.
        ids: ``[rows, cols]`` int, the token of each patch.
        fills: Colour inside each group.
        outlines: Colour of its outline; groups without one are not drawn.
        scale: Pixels shown per pixel of the image.
        stroke: Width of an outline in pixels of the image.
        hatch: From one line of the hatching to the next, in pixels of the image.
    """
    height, width = image.shape[:2]
    dropped = ids == DROPPED
    paths = [
        _path(ids == group, grid, stroke, group, fills[group], outlines[group])
        for group in sorted(outlines)
    ]
    lines = [
        f'<svg xmlns="{NAMESPACE}" viewBox="0 0 {width} {height}" '
        f'width="{width * scale}" height="{height * scale}">',
        f'<image width="{width}" height="{height}" style="image-rendering:pixelated" '
        f'href="{data_url(image)}"/>',
        *(dropped_paths(dropped, grid, hatch) if dropped.any() else []),
        f'<g stroke-width="{stroke:g}" stroke-linejoin="miter">',
        *paths,
        "</g>",
        "</svg>",
    ]
    return "\n".join(lines) + "\n"


def dropped_paths(
    mask: NDArray[np.bool_], grid: PatchGrid, hatch: float, end: str = ""
) -> list[str]:
    """The patches of which nothing is left: dark, with lines across.

    Args:
        mask: ``[rows, cols]`` bool, those patches.
        grid: How the image is cut into patches.
        hatch: From one line to the next, in pixels of the image.
        end: Of the pattern's id, where one page holds several pictures.
    """
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


def _path(
    mask: NDArray[np.bool_],
    grid: PatchGrid,
    stroke: float,
    group: int,
    fill: Colour,
    outline: Colour,
) -> str:
    return (
        f'<path d="{path_around(mask, grid, stroke)}" fill="{hex_colour(fill)}" '
        f'stroke="{hex_colour(outline)}">'
        f"<title>token {group}: {int(mask.sum())} patches</title></path>"
    )


def data_url(image: NDArray[np.uint8]) -> str:
    """An image as a PNG inside a URL.

    Args:
        image: ``[H, W, 3]`` uint8.
    """
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "png", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
