"""Colours of groups: the mean of their pixels inside, a palette for the colour-blind outside."""

from __future__ import annotations

from collections import Counter

import numpy as np
from numpy.typing import NDArray

from tome_export.inspect.groups import DROPPED
from tome_export.spec import PatchGrid

Colour = tuple[int, int, int]

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

HATCHES = 4
"""A patch's shorter side is this many hatch lines apart."""


def outline_colours(ids: NDArray[np.int64]) -> dict[int, Colour]:
    """A colour for every group of more than one patch; groups that touch differ where they can.

    Greedy colouring, the group with the most neighbours first. Groups need not be connected, so
    more colours than the palette has may be wanted; then the one is taken that the fewest shared
    edges have. The same groups always get the same colours.

    Args:
        ids: ``[rows, cols]`` int, the token of each patch; dropped ones have no outline.
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
    """The mean pixel of every group, rounded.

    Args:
        image: ``[H, W, 3]`` uint8.
        grid: How it is cut into patches.
        ids: ``[rows, cols]`` int, the token of each patch.
    """
    seen = image[: grid.rows * grid.height, : grid.cols * grid.width].astype(np.float64)
    patches = seen.reshape(grid.rows, grid.height, grid.cols, grid.width, 3).mean(axis=(1, 3))
    names, inverse, counts = np.unique(ids, return_inverse=True, return_counts=True)
    sums = np.zeros((len(names), 3))
    np.add.at(sums, inverse.ravel(), patches.reshape(-1, 3))
    means = np.rint(sums / counts[:, None]).astype(int).tolist()
    return {int(name): (r, g, b) for name, (r, g, b) in zip(names, means, strict=True)}


def hex_colour(colour: Colour) -> str:
    """As ``#rrggbb``."""
    return "#{:02x}{:02x}{:02x}".format(*colour)
