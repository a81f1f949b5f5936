"""A Transformers checkpoint's ``preprocessor_config.json`` as ``Preprocessing``."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from tome_export.errors import InputError
from tome_export.models.hf_values import positive, whole
from tome_export.spec import Interpolation, Preprocessing

FILE = "preprocessor_config.json"

RESAMPLING: dict[int, Interpolation] = {0: "nearest", 2: "bilinear", 3: "bicubic"}
"""PIL's numbers of those that ``Preprocessing`` has."""

SQUASHES = (
    "its own processor resizes to the size whatever the shape, here images are centre-cropped"
)
PADS = "its own processor pads images to a square, here they are centre-cropped"
TILES = "its own processor cuts images into tiles, here they are centre-cropped"

_SQUARES = ("ViT", "DeiT", "Siglip")
"""Processors, by how their names begin, that read a size of one number as height and width."""


def read_processor(folder: Path) -> dict[str, Any]:
    """A folder's ``preprocessor_config.json``; empty if there is none.

    Raises:
        InputError: if it is not a JSON object.
    """
    path = folder / FILE
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(
            f"{path} is not a JSON object ({error}); get the checkpoint again"
        ) from None
    if not isinstance(found, dict):
        raise InputError(f"{path} holds a {type(found).__name__}; expected a JSON object")
    return found


def preprocessing_of(
    values: dict[str, Any], defaults: Preprocessing, where: str, *, squares: bool = False
) -> tuple[Preprocessing, str]:
    """Read an image processor's configuration.

    Args:
        values: Its content; empty if there is none.
        defaults: What holds where it is silent; its size is that of the model.
        where: Name of the checkpoint, for messages.
        squares: Whether a size of one number is height and width, where the configuration does
            not name its processor; else it is the shorter side.

    Returns:
        The preprocessing, and a remark on what it cannot express, or "".

    Raises:
        InputError: if it does something that ``Preprocessing`` has no word for.
    """
    if not values:
        return defaults, "without preprocessor_config.json, preprocessing is its family's"
    factor = positive(values.get("rescale_factor", 1 / 255), _key(where, "rescale_factor"))
    if not values.get("do_rescale", True) or not math.isclose(factor, 1 / 255, rel_tol=1e-6):
        raise _refused(where, "pixels that are not scaled to [0, 1]")
    channels = defaults.input_size[0]
    mean, std = (0.0,) * channels, (1.0,) * channels
    if values.get("do_normalize", True):
        mean = _per_channel(values, "image_mean", defaults.mean, where)
        std = _per_channel(values, "image_std", defaults.std, where)
        if 0.0 in std:
            raise InputError(
                f"{_key(where, 'image_std')} is {values['image_std']}; expected no zero"
            )
    number = values.get("resample", 3)
    if not isinstance(number, int) or number not in RESAMPLING:
        raise _refused(where, f"PIL's resampling {number}")
    if not values.get("do_resize", True):
        raise _refused(where, "images that are not resized")
    named = values.get("image_processor_type") or values.get("feature_extractor_type")
    if named:
        squares = str(named).startswith(_SQUARES)
    side, edge, remark = _sides(values, defaults, where, squares)
    if edge < min(side):
        raise _refused(where, f"a cut of {side[0]} x {side[1]} out of images of {edge}")
    crop_pct = side[0] / edge
    # floor(side / crop_pct) is what resizes.
    if math.floor(side[0] / crop_pct) != edge:
        crop_pct = math.nextafter(crop_pct, 0.0)
    if values.get("do_pad"):
        remark = PADS
    return Preprocessing((channels, *side), mean, std, crop_pct, RESAMPLING[number]), remark


def check_size(found: Preprocessing, expected: Preprocessing, where: str) -> None:
    """Refuse preprocessing that makes images of another size than the model takes.

    Raises:
        InputError: naming both.
    """
    (height, width), (tall, wide) = found.input_size[1:], expected.input_size[1:]
    if (height, width) != (tall, wide):
        raise InputError(
            f"{FILE} of {where} makes images of {height} x {width}, and its config.json says "
            f"{tall} x {wide}; expected the same"
        )


def _per_channel(
    values: dict[str, Any], key: str, default: tuple[float, ...], where: str
) -> tuple[float, ...]:
    found = values.get(key)
    if found is None:
        return default
    ok = isinstance(found, list) and len(found) == len(default)
    if not ok or not all(
        isinstance(v, int | float) and not isinstance(v, bool) and math.isfinite(v) for v in found
    ):
        raise InputError(f"{_key(where, key)} is {found!r}; expected {len(default)} finite numbers")
    return tuple(float(v) for v in found)


def _sides(
    values: dict[str, Any], defaults: Preprocessing, where: str, squares: bool
) -> tuple[tuple[int, int], int, str]:
    """Size of the cut, length of the shorter side before it, and a remark."""
    size = values.get("size", defaults.input_size[1])
    crops = values.get("do_center_crop", "crop_size" in values)
    crop = values.get("crop_size", size) if crops else None
    if isinstance(crop, dict) and "shortest_edge" in crop:
        crop = crop["shortest_edge"]
    if isinstance(size, int) and squares:
        size = {"height": size, "width": size}
    cut = None if crop is None else _pair(crop, _key(where, "crop_size"))
    if isinstance(size, dict) and "shortest_edge" in size:
        size = size["shortest_edge"]
        if cut is None:
            raise _refused(where, "images that keep their shape")
    elif isinstance(size, dict) and "height" in size and "width" in size:
        height, width = _pair(size, _key(where, "size"))
        cut = cut or (height, width)
        if height * cut[1] != width * cut[0]:
            raise _refused(where, f"a size of {height} x {width} cut to {cut[0]} x {cut[1]}")
        return cut, height, SQUASHES
    elif not isinstance(size, int):
        raise _refused(where, f"size {size!r}")
    edge = whole(size, _key(where, "size"))
    return cut or (edge, edge), edge, ""


def _pair(size: Any, what: str) -> tuple[int, int]:
    height, width = (
        (size.get("height"), size.get("width")) if isinstance(size, dict) else (size, size)
    )
    return whole(height, what), whole(width, what)


def _key(where: str, key: str) -> str:
    return f"{FILE} of {where}: {key}"


def _refused(where: str, what: str) -> InputError:
    return InputError(
        f"preprocessor_config.json of {where} asks for {what}, which is not supported; expected a "
        "resize to a fixed size, a centre crop, scaling to [0, 1] and normalisation"
    )
