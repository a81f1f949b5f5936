"""A dense output as a picture: a map in grey, or the best of several channels in colours."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray
    from PIL.Image import Image

COLOURS = 256
"""Classes that a picture with a palette tells apart; of more, it is 16-bit grey."""


def is_picture(shape: Sequence[int]) -> bool:
    """Whether a dense output of one image ``shape`` can be drawn: ``[H, W]`` or ``[K, H, W]``."""
    return len(shape) in (2, 3) and all(shape)


def class_map(values: NDArray[Any]) -> NDArray[np.int64] | None:
    """The channel of the largest value ``[H, W]`` of ``[K, H, W]``; None of a single channel."""
    if values.ndim == 2 or len(values) == 1:
        return None
    return np.asarray(values.argmax(axis=0), np.int64)


def picture_of(values: NDArray[Any]) -> Image:
    """Draw the finite dense output of one image, pixel by pixel.

    Args:
        values: ``[H, W]`` or ``[1, H, W]``, drawn as 8-bit grey from its lowest value, black, to
            its highest, white; or ``[K, H, W]``, drawn as the index of the largest channel, in the
            colours of the PASCAL VOC challenge.
    """
    from PIL import Image

    classes = class_map(values)
    if classes is None:
        plain = values.reshape(values.shape[-2:]).astype(np.float64)
        low, high = plain.min(), plain.max()
        scaled = (plain - low) / (high - low) if high > low else np.zeros_like(plain)
        return Image.fromarray(np.rint(255 * scaled).astype(np.uint8))
    if len(values) > COLOURS:
        return Image.fromarray(classes.astype(np.uint16))
    picture = Image.fromarray(classes.astype(np.uint8))
    picture.putpalette(palette().tobytes())
    return picture


def palette() -> NDArray[np.uint8]:
    """The colours ``[256, 3]`` of PASCAL VOC: the bits of an index, dealt to red, green and blue.

    Source: ``VOClabelcolormap.m`` of the challenge's development kit.
    """
    bits = np.arange(COLOURS)[:, None] >> np.arange(8) & 1
    colours = np.zeros((COLOURS, 3), np.int64)
    for bit in range(8):
        colours[:, bit % 3] |= bits[:, bit] << (7 - bit // 3)
    return colours.astype(np.uint8)
