"""The section with pictures of merged tokens, which a slider leads through the layers.

Each image is embedded once. Where a browser runs scripts it draws every layer from a few bytes per
patch; else, and on paper, the drawing of the last layer lies over the image.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from tome_export.display import counted
from tome_export.report.parts import Gallery, Picture, Section, Text
from tome_export.visualize.draw import (
    DARK,
    HATCH,
    PALETTE,
    Look,
    hex_colour,
    mean_colours,
    outline_colours,
)
from tome_export.visualize.groups import DROPPED
from tome_export.visualize.svg import data_url, dropped_paths, path_around

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from tome_export.visualize.groups import LayerGroups, MergeMap

TITLE = "Which patches became one token"

BUDGET = 1_900_000
"""Characters of all embedded images: the page is to stay below 3 MB."""

QUALITIES = (92, 85, 75, 60, 40, 20)
"""JPEG, tried in turn where the images as PNG would be too large."""


DROPPED_GROUP = 0xFFFF
"""What the page's script has in place of the group of a dropped patch."""


def pictures_section(
    maps: Sequence[MergeMap], names: Sequence[str], tokens: Sequence[int], reason: str | None
) -> Section:
    """Pictures of every layer.

    Args:
        maps: One per image, from ``pipeline.inspect``.
        names: Of the images.
        tokens: Tokens that enter the first layer, and that leave each.
        reason: Why there are none, if there are none.
    """
    if not maps:
        why = reason or "none were asked for; give images, or --samples above 0"
        return Section("pictures", TITLE, (Text(f"No pictures: {why}."),))
    encoded = _hrefs([one.image for one in maps])
    pictures = [
        _picture(index, *of) for index, of in enumerate(zip(maps, names, encoded, strict=True))
    ]
    data = {
        "tokens": tokens,
        "palette": [hex_colour(colour) for colour in PALETTE],
        "dropped": [DROPPED_GROUP, hex_colour(DARK), hex_colour(HATCH)],
        "images": [_data(one) for one in maps],
    }
    depth = len(tokens) - 1
    lead = (
        "A token of several patches is filled with their mean colour and outlined; patches far "
        "apart may be one token, and then have one colour. A patch that is still a token by "
        "itself shows the image. Token counts include those that are no patches, such as the "
        "class token."
    )
    if any(groups.dropped for one in maps for groups in one.layers):
        lead += " Dropped patches are dark and hatched: nothing is left of them."
    last = f"after layer {depth - 1}: {counted(tokens[-1], 'token')}"
    return Section("pictures", TITLE, (Text(lead), Gallery(pictures, data, depth, last)))


def _picture(index: int, one: MergeMap, name: str, href: str) -> Picture:
    height, width = one.image.shape[:2]
    groups, look = one.layers[-1], Look.of(one)
    fills = mean_colours(one.image, one.grid, groups.ids)
    stroke = look.outline / look.scale
    paths = [
        (
            path_around(groups.ids == group, one.grid, stroke),
            hex_colour(fills[group]),
            hex_colour(colour),
        )
        for group, colour in sorted(outline_colours(groups.ids).items())
    ]
    caption = (
        f"{name} after layer {groups.layer}: {counted(len(paths), 'token')} of several patches, "
        f"the largest of {groups.largest}"
    )
    if groups.dropped:
        caption += f", {groups.dropped} of {groups.ids.size} patches dropped"
    hatch = look.hatch[0] / look.scale
    dropped = "".join(dropped_paths(groups.ids == DROPPED, one.grid, hatch, f"-{index}"))
    return Picture(name, width, height, href, paths, dropped, stroke, caption)


def _data(one: MergeMap) -> dict[str, Any]:
    """What the script needs of one image to draw as ``inspect.draw`` does."""
    look = Look.of(one)
    return {
        "rows": one.grid.rows,
        "cols": one.grid.cols,
        "height": one.grid.height,
        "width": one.grid.width,
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
    return [
        _base64(index[groups.ids].tobytes()),
        _base64(bytes(colours)),
        groups.largest,
        groups.dropped,
    ]


def _base64(content: bytes) -> str:
    return base64.b64encode(content).decode("ascii")


def _hrefs(images: Sequence[NDArray[np.uint8]]) -> list[str]:
    """The images as PNG, or, where that is too much, as the best JPEG that fits."""
    share = BUDGET // len(images)
    return [_href(image, share) for image in images]


def _href(image: NDArray[np.uint8], most: int) -> str:
    from PIL import Image

    href = data_url(image)
    for quality in QUALITIES:
        if len(href) <= most:
            break
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, "jpeg", quality=quality, optimize=True)
        href = "data:image/jpeg;base64," + _base64(buffer.getvalue())
    return href
