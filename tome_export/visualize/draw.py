"""Pictures of merged tokens, as in figure 4 of the ToMe paper (arXiv 2210.09461).

A token of several patches has the mean colour of its pixels inside, and one of a palette for the
colour-blind around it.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from tome_export.spec import PatchGrid
from tome_export.visualize.groups import DROPPED, MergeMap

if TYPE_CHECKING:
    from PIL import Image

Format = Literal["png", "svg"]

PATCH_PIXELS = 14
"""Least pixels of a patch's side in a picture: below that, outlines hide what they surround."""

LONGER_SIDE = 448
"""Pixels of a picture's longer side where none are asked for."""

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
        """Those of an image.

        Args:
            merge_map: The image.
            size: The picture's longer side is at least this, and less than one image more.
        """
        side = min(merge_map.grid.height, merge_map.grid.width)
        longer = max(merge_map.image.shape[:2])
        scale = max(math.ceil(PATCH_PIXELS / side), math.ceil(size / longer))
        step = max(3, round(side * scale / 4))
        return cls(scale, max(2, round(side * scale / 10)), (step, max(1, step // 4)))


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
