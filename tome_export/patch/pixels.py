"""What is done to an image's own pixels in front of a library model: scaling, mean, std, layout.

They are operators of the graph, in float32 and in the order of ``data.pixels.normalised``, so that
what the model sees is bit for bit what it would be given of the form ``float32``, and rounding
decides no merge otherwise. Folding them into the convolution that cuts patches would not be: the
products of 0 to 255 round otherwise than those of -2 to 2, and weights divided by 255 std lie near
the subnormals of float16. docs/raw-pixels.md says what folding would save.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tome_export.spec import Preprocessing

DTYPES = {"float32": torch.float32, "uint8": torch.uint8}


def pixel_shape(
    input_size: tuple[int, ...], preprocessing: Preprocessing | None
) -> tuple[int, ...]:
    """Shape of the pixel values of one image or video of a size ``([F,] C, H, W)``."""
    if preprocessing is None or preprocessing.form != "uint8":
        return input_size
    *frames, channels, height, width = input_size
    return (*frames, height, width, channels)


def normalised(pixel_values: Tensor, preprocessing: Preprocessing, dtype: torch.dtype) -> Tensor:
    """Pixels of a form of ``uint8`` as a library model takes them, ``[..., C, H, W]``.

    They are computed in float32 and cast once, or in float64 for that.
    """
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    # Cast before anything else: TensorRT has no other operator on uint8.
    x = pixel_values.to(wide)
    if preprocessing.form == "uint8":
        # Laid out as floats come: torch would convolve channels that lie inside in another order.
        x = x.movedim(-1, -3).contiguous()
    # Rounded to float32, as data.pixels has them.
    mean, std = (
        torch.tensor(values, dtype=torch.float32, device=x.device).to(wide)[:, None, None]
        for values in (preprocessing.mean, preprocessing.std)
    )
    return ((x / 255 - mean) / std).to(dtype)
