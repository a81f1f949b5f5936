"""Colours and outlines of merged tokens, as in figure 4 of the ToMe paper (arXiv 2210.09461).

A token of several patches has the mean colour of its pixels inside, and one of a palette for the
colour-blind around it; patches that were dropped are dark and hatched.
"""

from __future__ import annotations

import base64
import io
import math
from collections import Counter
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tome_export.runtime.merge_maps import DROPPED, MergeMap
from tome_export.spec import PatchGrid

PATCH_PIXELS = 14
"""Least pixels of a patch's side in a picture: below that, outlines hide what they surround."""

LONGER_SIDE = 448
"""Pixels of a picture's longer side where none are asked for."""

Colour = tuple[int, int, int]
Point = tuple[float, float]
Loop = list[tuple[int, int]]

PALETTE: tuple[Colour, ...] = (
    (230, 159, 0),
    (86, 180, 233),
    (240, 228, 66),
    (0, 114, 178),
    (213, 94, 0),
    (0, 158, 115),
    (204, 121, 167),
)
"""Okabe and Ito's colours (Color Universal Design, 2008) without black, which shadows hide."""

DARK: Colour = (32, 32, 32)
HATCH: Colour = (112, 112, 112)
"""Ground and lines of the hatching over patches that were dropped: no colour of a token."""


@dataclass(frozen=True)
class Look:
    """Measures of a picture, in its pixels.

    Attributes:
        scale: Pixels per pixel of the image: a whole number, so that no pixel is mixed.
        outline: Width of an outline: a tenth of a patch's shorter side.
        hatch: From one hatch line to the next, a quarter of that side, and of one line.
    """

    scale: int
    outline: int
    hatch: tuple[int, int]

    @classmethod
    def of(cls, merge_map: MergeMap, size: int = LONGER_SIDE) -> Look:
        """Those of an image; the picture's longer side is at least ``size``."""
        side = min(merge_map.grid.height, merge_map.grid.width)
        longer = max(merge_map.image.shape[:2])
        scale = max(math.ceil(PATCH_PIXELS / side), math.ceil(size / longer))
        step = max(3, round(side * scale / 4))
        return cls(scale, max(2, round(side * scale / 10)), (step, max(1, step // 4)))


def hex_colour(colour: Colour) -> str:
    """As ``#rrggbb``."""
    return "#{:02x}{:02x}{:02x}".format(*colour)


def outline_colours(ids: NDArray[np.int64]) -> dict[int, Colour]:
    """A colour for every group of more than one patch; groups that touch differ where they can.

    Greedy colouring of ids ``[rows, cols]``, the group with the most neighbours first. Groups need
    not be connected, so more colours than the palette has may be wanted; then the one is taken
    that the fewest shared edges have. The same groups always get the same colours.
    """
    names, counts = np.unique(ids, return_counts=True)
    pairs = zip(names.tolist(), counts.tolist(), strict=True)
    groups = [name for name, count in pairs if count > 1 and name != DROPPED]
    touching: dict[int, Counter[int]] = {group: Counter() for group in groups}
    for one, other in _contacts(ids):
        if one != other and one in touching and other in touching:
            touching[one][other] += 1
            touching[other][one] += 1
    chosen: dict[int, int] = {}
    used: Counter[int] = Counter()
    for group in sorted(groups, key=lambda g: (-len(touching[g]), g)):
        taken: Counter[int] = Counter()
        for neighbour, edges in touching[group].items():
            if neighbour in chosen:
                taken[chosen[neighbour]] += edges
        # Among those that fit, the rarest so far: colours are spread over the whole image.
        chosen[group] = min(range(len(PALETTE)), key=lambda c: (taken[c], used[c], c))
        used[chosen[group]] += 1
    return {group: PALETTE[chosen[group]] for group in groups}


def _contacts(ids: NDArray[np.int64]) -> list[tuple[int, int]]:
    """Pairs of patches that share an edge or a corner, by their groups."""
    rows, cols = ids.shape
    pairs: list[tuple[int, int]] = []
    for down, right in ((0, 1), (1, 0), (1, 1), (1, -1)):
        left = max(0, -right)
        here = ids[: rows - down, left : cols - max(0, right)]
        there = ids[down:, left + right : cols + min(0, right)]
        pairs += zip(here.ravel().tolist(), there.ravel().tolist(), strict=True)
    return pairs


def mean_colours(
    image: NDArray[np.uint8], grid: PatchGrid, ids: NDArray[np.int64]
) -> dict[int, Colour]:
    """The mean pixel of every group of ids ``[rows, cols]`` in an image ``[H, W, 3]``, rounded."""
    covered = image[: grid.rows * grid.height, : grid.cols * grid.width].astype(np.float64)
    patches = covered.reshape(grid.rows, grid.height, grid.cols, grid.width, 3).mean(axis=(1, 3))
    names, inverse, counts = np.unique(ids, return_inverse=True, return_counts=True)
    sums = np.zeros((len(names), 3))
    np.add.at(sums, inverse.ravel(), patches.reshape(-1, 3))
    means = np.rint(sums / counts[:, None]).astype(int).tolist()
    return {int(name): (r, g, b) for name, (r, g, b) in zip(names, means, strict=True)}


def group_paths(merge_map: MergeMap, layer: int, stroke: float) -> dict[int, tuple[str, str, str]]:
    """Outline, fill and stroke of each token of several patches, for SVG.

    The stroke's width is in pixels of the image, as are all lengths below.
    """
    ids, grid = merge_map.layers[layer].ids, merge_map.grid
    fills = mean_colours(merge_map.image, grid, ids)
    return {
        group: (
            path_around(ids == group, grid, stroke),
            hex_colour(fills[group]),
            hex_colour(colour),
        )
        for group, colour in sorted(outline_colours(ids).items())
    }


def dropped_paths(
    mask: NDArray[np.bool_], grid: PatchGrid, hatch: float, end: str = ""
) -> list[str]:
    """The patches of which nothing is left, as SVG elements: dark, with a line every ``hatch``.

    ``end`` ends the pattern's id, where one page holds several pictures.
    """
    if not mask.any():
        return []
    return [
        f'<defs><pattern id="dropped{end}" width="{hatch:g}" height="{hatch:g}" '
        'patternUnits="userSpaceOnUse">'
        f'<rect width="{hatch:g}" height="{hatch:g}" fill="{hex_colour(DARK)}"/>'
        f'<path d="M0,{hatch:g}L{hatch:g},0" stroke="{hex_colour(HATCH)}" '
        f'stroke-width="{hatch / 5:g}"/></pattern></defs>',
        f'<path d="{path_around(mask, grid, 0)}" fill="url(#dropped{end})">'
        f"<title>dropped: {int(mask.sum())} patches</title></path>",
    ]


def path_around(mask: NDArray[np.bool_], grid: PatchGrid, stroke: float) -> str:
    """Path data of the line around the patches of a mask ``[rows, cols]``.

    A stroke lies across its path: this one is drawn half a stroke inside and stays within them.
    """
    loops = (inset(loop, (grid.width, grid.height), stroke / 2) for loop in loops_from_mask(mask))
    return "".join("M" + "L".join(f"{x:g},{y:g}" for x, y in loop) + "Z" for loop in loops)


def loops_from_mask(mask: NDArray[np.bool_]) -> list[Loop]:
    """Trace the outline of a mask ``[rows, cols]``: loops of corners ``(column, row)``.

    Outer edges run clockwise (y points down), edges of holes the other way, so that the inside is
    always on the right. Patches that touch at a corner only get loops of their own.
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
    """A loop in pixels, moved inwards by less than half a patch ``(width, height)``."""
    points = []
    for index, (x, y) in enumerate(loop):
        shift_x = shift_y = 0
        before, here, after = loop[index - 1], (x, y), loop[(index + 1) % len(loop)]
        for (x0, y0), (x1, y1) in ((before, here), (here, after)):
            shift_x -= (y1 > y0) - (y1 < y0)
            shift_y += (x1 > x0) - (x1 < x0)
        points.append((x * patch[0] + shift_x * by, y * patch[1] + shift_y * by))
    return points


def data_url(image: NDArray[np.uint8], kind: str = "png", **options: int) -> str:
    """An image ``[H, W, 3]`` uint8 inside a URL, as PNG or of another kind of Pillow's."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, kind, optimize=True, **options)
    return f"data:image/{kind};base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
