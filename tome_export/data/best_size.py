"""Which of several image sizes wastes least of an image; also runs inside the server.

Needs nothing but Python.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

RESAMPLED = 0.3
"""What pixels that are lost to shrinking, or invented, count beside parts of an image that are not
seen: models are trained on shrunken images, and what is cut away they cannot know of."""


def waste(
    image: tuple[int, int], size: tuple[int, int], crop_pct: float = 1.0, resize: str = "crop"
) -> float:
    """How much is wasted when an image becomes the input of a model of some image size.

    It is the sum of four shares, each 0 where nothing is wasted and below 1, the last of them
    weighted by ``RESAMPLED``:

    - cropped: of the image's area, what lies outside of the cut;
    - empty: of the input's area, what is border and no image (``pad``, ``letterbox``);
    - distorted: ``1 - s / t``, where ``s`` is the smaller and ``t`` the larger of the scales of the
      two axes (``squash``);
    - resampled: ``1 - min(a, 1 / a)``, where ``a`` is input pixels per image pixel along a side,
      the mean of both. Above 1 it is the pixels that are computed although enlarging has invented
      them, below 1 the image's pixels that are lost to shrinking.

    So the shape decides, and among sizes whose shapes fit about as well how many pixels the image
    has: of two sizes of one shape it gets the larger one from the geometric mean of both on.

    Args:
        image: Width and height of the image, upright.
        size: Height and width of the model's images.
        crop_pct: See ``spec.Preprocessing``, as for ``resize``.
        resize: How the image is brought to the size.
    """
    width, height = image
    scales = size[1] / crop_pct / width, size[0] / crop_pct / height
    if resize == "crop":
        scales = (max(scales),) * 2
    elif resize != "squash":
        scales = (min(scales),) * 2
    spans = scales[0] * width / size[1], scales[1] * height / size[0]
    seen = min(1, 1 / spans[0]) * min(1, 1 / spans[1])
    covered = min(1, spans[0]) * min(1, spans[1])
    scale = math.sqrt(scales[0] * scales[1])
    distorted, resampled = 1 - min(scales) / max(scales), 1 - min(scale, 1 / scale)
    return (1 - seen) + (1 - covered) + distorted + RESAMPLED * resampled


def best_size(
    image: tuple[int, int],
    sizes: Sequence[tuple[int, int]],
    crop_pct: float = 1.0,
    resize: str = "crop",
) -> tuple[int, int]:
    """The image size of least ``waste``; of equal ones that of fewest pixels, then the lower one.

    ``image`` is width and height, ``sizes`` and the answer are height and width.
    """
    return min(
        sizes,
        key=lambda size: (round(waste(image, size, crop_pct, resize), 9), size[0] * size[1], size),
    )
