"""Images of another size: which sizes a model's patches divide, and of which grid positions are."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from tome_export.errors import InputError
from tome_export.spec import ImageSize

if TYPE_CHECKING:
    from torch import Tensor

    State = dict[str, Tensor]

Grid = tuple[int, int]
"""Rows and columns of the patches of an image."""


def check_divides(size: ImageSize, patch: Grid, who: str) -> None:
    """Refuse a size that patches of so many pixels, height and width, do not divide."""
    wrong = []
    for what, side, pixels in zip(
        ("height", "width"), (size.height, size.width), patch, strict=True
    ):
        if side % pixels:
            below = side // pixels * pixels
            nearest = [str(one) for one in (below, below + pixels) if one]
            wrong.append(f"a {what} of {' or '.join(nearest)}")
    if wrong:
        raise InputError(
            f"image size is {size}, which the patches of {who}, {patch[0]}x{patch[1]} pixels, do "
            f"not divide; expected {' and '.join(wrong)}"
        )


def position_grid(count: int, own: Grid, wanted: Grid) -> Grid | None:
    """Rows and columns of the patches that so many positions are for; None if nothing says it.

    The grid of the model's own size goes before the wanted one, which a file may be saved for, and
    that before a square.
    """
    side = math.isqrt(count)
    known = (grid for grid in (own, wanted, (side, side)) if grid[0] * grid[1] == count)
    return next(known, None)


def fit_positions(
    state: State, key: str, rows: int, own: Grid, wanted: Grid, **how: Any
) -> tuple[State, Grid | None]:
    """A state whose positions are for the wanted grid, and which they were for; None for that.

    Args:
        state: Tensors of a checkpoint.
        key: Name of the position embedding, ``[..., positions, C]``.
        rows: Positions of the model for the wanted grid, those of prefix tokens included; 0 for a
            model that has none to resample.
        own: Grid of the model's own image size.
        wanted: Grid of the image size that is asked for.
        how: How timm's ``resample_abs_pos_embed`` is to interpolate: bicubic and antialiased, as
            timm and open_clip do it, unless it says otherwise.
    """
    found = state.get(key)
    if found is None or found.ndim < 2 or not rows:
        return state, None
    prefix = rows - wanted[0] * wanted[1]
    before = position_grid(found.shape[-2] - prefix, own, wanted)
    if before in (None, wanted):
        return state, None
    from timm.layers import resample_abs_pos_embed

    flat = found.float().reshape(1, *found.shape[-2:])
    resampled = resample_abs_pos_embed(flat, list(wanted), list(before), prefix, **how)
    return {**state, key: resampled.reshape(*found.shape[:-2], *resampled.shape[1:])}, before


def resampling(before: Grid | None, wanted: Grid) -> str:
    """What to say of positions that were resampled; empty if they were not."""
    if before in (None, wanted):
        return ""
    return "; position embedding resampled {}x{} -> {}x{} patches".format(*before, *wanted)
