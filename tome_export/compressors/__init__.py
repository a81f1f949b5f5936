"""Compressors: a last stage that makes a fixed number of tokens for a language model.

One file each, a line in ``COMPRESSORS`` each.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from tome_export.errors import InputError

if TYPE_CHECKING:
    from tome_export.compressors.base import Compressor

COMPRESSORS = {
    "avgpool": "avgpool.AvgPool",
    "resampler": "resampler.Resampler",
}
"""Name -> module of this package and class."""


def compressor_class(name: str) -> type[Compressor]:
    """The class of a compressor.

    Raises:
        InputError: if there is none of that name.
    """
    if name not in COMPRESSORS:
        raise InputError(f"compressor is {name!r}; expected one of {', '.join(COMPRESSORS)}")
    module, _, cls = COMPRESSORS[name].partition(".")
    found: type[Compressor] = getattr(importlib.import_module(f"{__name__}.{module}"), cls)
    return found
