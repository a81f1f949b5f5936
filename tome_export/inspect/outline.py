"""The outline of a set of patches as closed polygons along the patch grid."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Point = tuple[float, float]
Loop = list[tuple[int, int]]


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
    """Follow edges from a corner until it is reached again, and take them out of ``ahead``.

    The start is the upper one of the leftmost corners, where only one loop can turn.
    """
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
