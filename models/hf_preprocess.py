"""A Transformers checkpoint's ``preprocessor_config.json`` as ``Preprocessing``."""

from __future__ import annotations

import math
from typing import Any

from tome_export.errors import InputError
from tome_export.spec import Interpolation, Preprocessing

RESAMPLING: dict[int, Interpolation] = {0: "nearest", 2: "bilinear", 3: "bicubic"}
"""PIL's numbers of those that ``Preprocessing`` has."""

SQUASHES = (
    "its own processor resizes to the size whatever the shape, here images are centre-cropped"
)


def preprocessing_of(
    values: dict[str, Any], defaults: Preprocessing, where: str
) -> tuple[Preprocessing, str]:
    """Read an image processor's configuration.

    Args:
        values: Its content; empty if there is none.
        defaults: What holds where it is silent; its size is that of the model.
        where: Name of the checkpoint, for messages.

    Returns:
        The preprocessing, and a remark on what it cannot express, or "".

    Raises:
        InputError: if it does something that ``Preprocessing`` has no word for.
    """
    if not values:
        return defaults, "without preprocessor_config.json, preprocessing is its family's"
    if not values.get("do_rescale", True) or not math.isclose(
        values.get("rescale_factor", 1 / 255), 1 / 255, rel_tol=1e-6
    ):
        raise _refused(where, "pixels that are not scaled to [0, 1]")
    channels = defaults.input_size[0]
    mean, std = (0.0,) * channels, (1.0,) * channels
    if values.get("do_normalize", True):
        mean = tuple(float(v) for v in values.get("image_mean") or defaults.mean)
        std = tuple(float(v) for v in values.get("image_std") or defaults.std)
    number = values.get("resample", 3)
    if number not in RESAMPLING:
        raise _refused(where, f"PIL's resampling {number}")
    if not values.get("do_resize", True):
        raise _refused(where, "images that are not resized")
    side, edge, remark = _sides(values, defaults, where)
    crop_pct = side[0] / edge
    # floor(side / crop_pct) is what resizes.
    if math.floor(side[0] / crop_pct) != edge:
        crop_pct = math.nextafter(crop_pct, 0.0)
    return Preprocessing((channels, *side), mean, std, crop_pct, RESAMPLING[number]), remark


def _sides(
    values: dict[str, Any], defaults: Preprocessing, where: str
) -> tuple[tuple[int, int], int, str]:
    """Size of the cut, length of the shorter side before it, and a remark."""
    size = values.get("size", defaults.input_size[1])
    crops = values.get("do_center_crop", "crop_size" in values)
    crop = values.get("crop_size", size) if crops else None
    if isinstance(crop, dict) and "shortest_edge" in crop:
        crop = crop["shortest_edge"]
    if isinstance(size, dict) and "shortest_edge" in size:
        size = int(size["shortest_edge"])
        if crop is None:
            raise _refused(where, "images that keep their shape")
    elif isinstance(size, dict) and "height" in size and "width" in size:
        height, width = int(size["height"]), int(size["width"])
        cut = _pair(crop) if crop is not None else (height, width)
        if height * cut[1] != width * cut[0]:
            raise _refused(where, f"a size of {height} x {width} cut to {cut[0]} x {cut[1]}")
        return cut, height, SQUASHES
    elif not isinstance(size, int):
        raise _refused(where, f"size {size!r}")
    return (_pair(crop) if crop is not None else (size, size)), int(size), ""


def _pair(size: Any) -> tuple[int, int]:
    if isinstance(size, dict):
        return int(size["height"]), int(size["width"])
    return int(size), int(size)


def _refused(where: str, what: str) -> InputError:
    return InputError(
        f"preprocessor_config.json of {where} asks for {what}, which is not supported; expected a "
        "resize to a fixed size, a centre crop, scaling to [0, 1] and normalisation"
    )
