"""Whether patching alone changes what a model computes."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import TYPE_CHECKING

import numpy as np

from tome_export.errors import InputError
from tome_export.merge.schedule import Schedule

if TYPE_CHECKING:
    from torch import Tensor

    from tome_export.parity.decisions import Array
    from tome_export.patch import MergedModel

TOLERANCE = 1e-6
"""Relative difference allowed between the patched model at r = 0 and the library's own."""

ROUNDINGS = 4
"""Allowed where that is less than rounding does: so many times what one of the input does."""

BESIDE = 1e-3
"""Relative difference allowed of a map alone and in a batch: far above rounding."""

LIMIT = 1e-5
"""Never allowed: what fp32 keeps through a whole ViT."""


def check_library(model: MergedModel, images: Array) -> None:
    """Without merging, the patched model must be the library's own, or parity proves nothing.

    The two may order their operations differently. Most models keep the difference under 1e-6; for
    the others, deep ones with much before the blocks, it is measured what rounding does: the input
    is moved by one unit in the last place.

    Args:
        model: The patched model; it is compared without its compressor, which no library has.
        images: ``pixel_values`` of images or videos in the model's form. The library's model gets
            the float32 pixels that preprocessing makes of them, the patched one makes its own.

    Raises:
        InputError: if the outputs differ by more than 1e-6 of the largest, or four times what such
            a move does if that is more; by more than 1e-5 in any case. Of tokens, of the largest of
            the same channel, because a few channels of a tower are hundreds of times larger than
            the others.
    """
    import torch

    from tome_export.data.pixels import normalised
    from tome_export.patch import patch_with_settings

    preprocessing, floats = model.settings.preprocessing, images
    if preprocessing is not None and images.dtype == np.uint8:
        floats = normalised(images, asdict(preprocessing))
    settings = replace(model.settings, schedule=Schedule(0), compressor=None)
    plain = patch_with_settings(model, settings).eval()
    with torch.inference_mode():
        pixel_values = torch.from_numpy(floats)
        expected = model.library(pixel_values)
        inputs = plain.neutral_inputs(len(images))
        given = torch.from_numpy(images)
        found = plain.forward_observed(given, lambda _: None, inputs=inputs)
        channels = expected.ndim == 3 and model.map_name is None
        error, allowed = _relative(found, expected, channels), TOLERANCE
        if TOLERANCE < error <= LIMIT:
            moved = _relative(model.library(_next(pixel_values)), expected, channels)
            allowed = min(max(TOLERANCE, ROUNDINGS * moved), LIMIT)
        alone = expected
        if model.map_name is not None:
            beside = torch.cat([pixel_values, pixel_values.flip(-1)])
            alone = model.library(beside)[: len(expected)]
    if not _relative(alone, expected, channels=False) <= BESIDE:
        raise InputError(
            f"{model.map_name} of an image is another when it is in a batch with a second one; "
            "expected a model that treats every image by itself"
        )
    if not error <= allowed:
        raise InputError(
            f"the patched model without merging differs from the model's own output by {error:.1e} "
            f"relative, expected at most {allowed:.1e}: its forward is not what its classes "
            "compute; it is not supported"
        )


def _relative(found: Tensor, expected: Tensor, channels: bool) -> float:
    """The largest difference, of the largest value, or of that of the same channel (the last)."""
    scale = expected.abs()
    scale = scale.amax(dim=(0, 1)) if channels else scale.max()
    return float(((found - expected).abs() / scale.clamp_min(1e-30)).max())


def _next(x: Tensor) -> Tensor:
    """The neighbouring float of every value, above and below in turn."""
    import torch

    towards = torch.full_like(x, torch.inf)
    towards.view(-1)[1::2] = -torch.inf
    return torch.nextafter(x, towards)
