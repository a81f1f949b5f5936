"""Compressors: a last stage that makes a fixed number of tokens for a language model.

One file each, a line in ``COMPRESSORS`` each.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import MISSING, fields
from typing import TYPE_CHECKING

from tome_export.errors import InputError
from tome_export.reducers import class_of, values_from_text

if TYPE_CHECKING:
    from tome_export.compressors.base import Compressor

COMPRESSORS = {
    "avgpool": "avgpool.AvgPool",
    "resampler": "resampler.Resampler",
}
"""Name -> module of this package and class."""


def compressor_class(name: str) -> type[Compressor]:
    """The class of a compressor."""
    return class_of(COMPRESSORS, __name__, "compressor", name)


def compressor_from_text(text: str | None, options: Iterable[str] = ()) -> Compressor | None:
    """A compressor as the command line has it: ``avgpool:12x12``, ``resampler:weights.pt``.

    Behind the colon is the value of its first option; ``options`` are further ones, ``key=value``.
    """
    if text is None:
        if lone := next(iter(options), None):
            raise InputError(f"compressor option {lone!r} is given without --compress; give both")
        return None
    name, colon, first = text.partition(":")
    cls = compressor_class(name)
    own = fields(cls)
    given = [*([f"{own[0].name}={first}"] if colon else []), *options]
    values = values_from_text(cls, f"compressor {name}", given)
    for field in own:
        if field.default is MISSING and field.name not in values:
            raise InputError(
                f"compressor {name} is given without its {field.name}; expected it behind a "
                f"colon, such as {name}:12x12"
            )
    return cls(**values)
