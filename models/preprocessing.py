"""What a library says of its images, as ``Preprocessing`` or in words."""

from __future__ import annotations

import math
import sys
from typing import cast, get_args

from tome_export.errors import InputError
from tome_export.spec import Interpolation, Preprocessing, Resize


def interpolation_from(value: str, library: str) -> Interpolation:
    """A library's name of a way to resize; raises an ``InputError`` if we have no such way."""
    if value in get_args(Interpolation):
        return cast(Interpolation, value)
    raise InputError(
        f"{library} resizes images for this model with {value!r}; "
        f"supported: {', '.join(get_args(Interpolation))}"
    )


def crop_pct_of(side: int, edge: int) -> float:
    """The share ``side / edge``, of which ``floor(side / share)`` is ``edge`` again."""
    share = side / edge
    return share if math.floor(side / share) == edge else math.nextafter(share, 0.0)


def is_number(value: object) -> bool:
    """Whether a value is a finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return abs(value) <= sys.float_info.max  # JSON may hold whole numbers beyond any float


def are_numbers(values: object, count: int) -> bool:
    """Whether values are a list or tuple of so many finite numbers."""
    if not isinstance(values, tuple | list) or len(values) != count:
        return False
    return all(map(is_number, values))


def in_words(found: Preprocessing) -> str:
    """What decides how images look, in one line."""
    height, width = found.input_size[1:]
    mean, std = (", ".join(f"{v:.4g}" for v in values) for values in (found.mean, found.std))
    cut = f" cut out of {math.floor(height / found.crop_pct)}" if found.crop_pct != 1 else ""
    how = f"{found.interpolation}{_RULES[found.resize]}"
    return f"size {height} x {width}{cut}, {how}, mean {mean}, std {std}"


_RULES: dict[Resize, str] = {
    "crop": "",
    "squash": " whatever the shape",
    "letterbox": " to fit, with borders",
    "pad": " after padding to its shape",
}
