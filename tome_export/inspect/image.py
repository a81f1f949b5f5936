"""From the model's tokens and pixels back to the image."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tome_export.artifact import Manifest
from tome_export.errors import InputError
from tome_export.spec import PatchGrid, Preprocessing


def grid_from_manifest(manifest: Manifest, where: Path) -> tuple[PatchGrid, int]:
    """Where a model's patches lie in an image, and the number of its prefix tokens.

    Artifacts of earlier versions do not say so; then patches are taken to be square, and there is
    one square of which as many as there are patches make up the image.

    Args:
        manifest: The content of ``build.json``.
        where: The artifact, for the error.

    Raises:
        InputError: if it cannot be told.
    """
    _, height, width = manifest.preprocessing.input_size
    prefix, tokens = manifest.merge.get("prefix"), manifest.tokens_in
    if not isinstance(prefix, int) or not isinstance(tokens, int):
        raise InputError(
            f"{where} does not say how many tokens are patches; rebuild it with this version"
        )
    if manifest.video:
        tokens = manifest.layers[0].tokens_in  # of one frame
    recorded = manifest.patches
    try:
        grid = PatchGrid(**recorded) if recorded else None
    except TypeError:
        grid = None
    if grid is None:
        grid = _square_grid(height, width, tokens - prefix)
    if (
        grid is None
        or grid.patches != tokens - prefix
        or grid.rows * grid.height > height
        or grid.cols * grid.width > width
    ):
        raise InputError(
            f"the {tokens - prefix} patches of {where} are not a grid over its images of "
            f"{height} x {width} pixels, so its tokens have no place in the image; only models "
            "that cut images into equal patches can be drawn"
        )
    return grid, prefix


def _square_grid(height: int, width: int, patches: int) -> PatchGrid | None:
    for side in range(1, min(height, width) + 1):
        if height % side == 0 and width % side == 0:
            grid = PatchGrid(height // side, width // side, side, side)
            if grid.patches == patches:
                return grid
    return None


def image_from_pixels(
    pixels: NDArray[np.float32], preprocessing: Preprocessing
) -> NDArray[np.uint8]:
    """What the model sees, as an image: the inverse of normalisation.

    Args:
        pixels: ``[C, H, W]`` float32 with one or three channels.
        preprocessing: By which they were made.

    Returns:
        ``[H, W, 3]`` uint8.
    """
    mean = np.asarray(preprocessing.mean)[:, None, None]
    std = np.asarray(preprocessing.std)[:, None, None]
    values = np.rint((pixels * std + mean) * 255).clip(0, 255).astype(np.uint8)
    return np.ascontiguousarray(np.broadcast_to(values, (3, *values.shape[1:])).transpose(1, 2, 0))
