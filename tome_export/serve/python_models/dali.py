"""Encoded images to ``pixel_values`` by DALI, which decodes on the GPU; in the server.

The server's DALI backend runs this file when it loads the model, and serialises the pipeline.
``preprocessing.json`` beside it says how images are resized, as ``pixels.py`` does it for
``_preprocess`` in Python; ``device`` is ``mixed`` for decoding on the GPU.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from nvidia.dali import fn, pipeline_def, types
from nvidia.dali import math as arrays
from nvidia.dali.plugin.triton import autoserialize

SETTINGS = json.loads((Path(__file__).parent / "preprocessing.json").read_text())

FILTERS = {"bilinear": types.INTERP_LINEAR, "bicubic": types.INTERP_CUBIC}


def rounded(number: Any) -> Any:
    """``round(number)`` of float64, halves to the even neighbour, as Python does it."""
    below = arrays.floor(number)
    half, odd = number - below == 0.5, below - 2 * arrays.floor(below / 2) == 1
    return below + fn.cast((number - below > 0.5) | (half & odd), dtype=types.FLOAT64)


def resized(height: Any, width: Any) -> tuple[Any, Any]:
    """Height and width, float64, that an image is resized to: see ``pixels._resized``."""
    _, *size = SETTINGS["input_size"]
    target_h, target_w = (math.floor(side / SETTINGS["crop_pct"]) for side in size)
    if SETTINGS["resize"] == "squash":
        return target_h + 0 * height, target_w + 0 * width
    if target_h == target_w:
        longer = arrays.floor(target_h * arrays.max(height, width) / arrays.min(height, width))
        upright = fn.cast(height >= width, dtype=types.FLOAT64)
        return target_h + upright * (longer - target_h), longer + upright * (target_w - longer)
    ratio = arrays.min(height / target_h, width / target_w)
    return rounded(height / ratio), rounded(width / ratio)


@autoserialize  # type: ignore[untyped-decorator]
@pipeline_def(  # type: ignore[untyped-decorator]
    batch_size=SETTINGS["max_batch"],
    num_threads=SETTINGS["threads"],
    device_id=0 if SETTINGS["device"] == "mixed" else None,
)
def preprocess() -> Any:
    """``image`` UINT8 ``[bytes]`` to ``pixel_values`` in the form that the model takes."""
    _, height, width = SETTINGS["input_size"]
    encoded = fn.external_source(device="cpu", name="image", dtype=types.UINT8, ndim=1)
    shape = fn.cast(fn.peek_image_shape(encoded), dtype=types.FLOAT64)  # upright, as decoded
    new_h, new_w = resized(shape[0], shape[1])
    images = fn.decoders.image(encoded, device=SETTINGS["device"], output_type=types.RGB)
    images = fn.resize(
        images,
        resize_x=fn.cast(new_w, dtype=types.FLOAT),
        resize_y=fn.cast(new_h, dtype=types.FLOAT),
        interp_type=FILTERS[SETTINGS["interpolation"]],
        antialias=True,
    )
    offset = rounded if SETTINGS["crop_offset"] == "round" else arrays.floor
    start = fn.stack(offset((new_h - height) / 2), offset((new_w - width) / 2))
    start = fn.cast(start, dtype=types.INT32)
    images = fn.slice(images, start=start, shape=[height, width], axes=[0, 1])
    if SETTINGS["form"] == "uint8":
        return images
    if SETTINGS["form"] == "uint8-nchw":
        return fn.transpose(images, perm=[2, 0, 1])
    return fn.crop_mirror_normalize(
        images,
        dtype=types.FLOAT,
        mean=[255 * value for value in SETTINGS["mean"]],
        std=[255 * value for value in SETTINGS["std"]],
        output_layout="CHW",
    )
