"""Pictures of merged tokens, which a slider leads through the layers.

Each image is embedded once. Where a browser runs scripts it draws every layer from a few bytes per
patch; else, and on paper, the drawing of the last layer lies over the image.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from tome_export.outlines import (
    DARK,
    HATCH,
    PALETTE,
    Look,
    data_url,
    dropped_paths,
    group_paths,
    hex_colour,
    mean_colours,
    outline_colours,
)
from tome_export.runtime.merge_maps import DROPPED, LayerGroups, MergeMap

if TYPE_CHECKING:
    from numpy.typing import NDArray

BUDGET = 1_900_000
"""Characters of all embedded images: the page is to stay below 3 MB."""

QUALITIES = (92, 85, 75, 60, 40, 20)
"""JPEG, tried in turn where the images as PNG would be too large."""

DROPPED_GROUP = 0xFFFF
"""What the page's script has in place of the group of a dropped patch."""


def gallery_from_maps(
    maps: Sequence[MergeMap], names: Sequence[str], tokens: Sequence[int]
) -> dict[str, Any] | None:
    """Pictures of every layer for the template; None without images.

    ``data`` is what the page's script draws from, ``drops`` whether a patch is dropped. ``tokens``
    are those that enter the first layer, and that leave each.
    """
    if not maps:
        return None
    pictures = [
        _picture(index, one, name, _href(one.image, BUDGET // len(maps)))
        for index, (one, name) in enumerate(zip(maps, names, strict=True))
    ]
    data = {
        "tokens": tokens,
        "palette": [hex_colour(colour) for colour in PALETTE],
        "dropped": [DROPPED_GROUP, hex_colour(DARK), hex_colour(HATCH)],
        "images": [_data(one) for one in maps],
    }
    drops = any(groups.dropped for one in maps for groups in one.layers)
    return {"pictures": pictures, "data": data, "drops": drops}


def _picture(index: int, one: MergeMap, name: str, href: str) -> dict[str, Any]:
    """One image with the drawing of its last layer; lengths are in pixels of the image."""
    groups, look = one.layers[-1], Look.of(one)
    stroke, hatch = look.outline / look.scale, look.hatch[0] / look.scale
    return {
        "name": name,
        "height": one.image.shape[0],
        "width": one.image.shape[1],
        "href": href,
        "groups": groups,
        "paths": [*group_paths(one, -1, stroke).values()],
        "dropped": "".join(dropped_paths(groups.ids == DROPPED, one.grid, hatch, f"-{index}")),
        "stroke": stroke,
    }


def _data(one: MergeMap) -> dict[str, Any]:
    """What the script needs of one image to draw as ``inspect`` does."""
    look = Look.of(one)
    return {
        **vars(one.grid),
        "scale": look.scale,
        "stroke": look.outline,
        "hatch": look.hatch,
        "layers": [_layer(one, groups) for groups in one.layers],
    }


def _layer(one: MergeMap, groups: LayerGroups) -> list[Any]:
    """Group of each patch, 0 for none, and red, green, blue and outline of each group.

    Then the patches of the largest token, and those that were dropped.
    """
    outlines = outline_colours(groups.ids)
    fills = mean_colours(one.image, one.grid, groups.ids)
    index = np.zeros(int(groups.ids.max(initial=0)) + 2, "<u2")
    index[DROPPED] = DROPPED_GROUP  # the last entry, which no token has
    colours = bytearray()
    for number, group in enumerate(sorted(outlines), 1):
        index[group] = number
        colours += bytes((*fills[group], PALETTE.index(outlines[group])))
    contents = (index[groups.ids].tobytes(), bytes(colours))
    texts = [base64.b64encode(content).decode("ascii") for content in contents]
    return [*texts, groups.largest, groups.dropped]


def _href(image: NDArray[np.uint8], most: int) -> str:
    """The image as PNG, or, where that is too much, as the best JPEG that fits."""
    href = data_url(image)
    for quality in QUALITIES:
        if len(href) <= most:
            break
        href = data_url(image, "jpeg", quality=quality)
    return href
