"""Options of compressors, read from text."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import MISSING, fields

from tome_export.compressors import compressor_class
from tome_export.compressors.base import Compressor
from tome_export.errors import InputError
from tome_export.reducers.options import values_from_text


def compressor_from_text(text: str | None, options: Iterable[str] = ()) -> Compressor | None:
    """A compressor as the command line has it: ``avgpool:12x12``, ``resampler:weights.pt``.

    Args:
        text: Name, and behind a colon the value of its first option; None for no compressor.
        options: Further ones, each ``key=value``.

    Raises:
        InputError: if there is no such compressor or option, a value does not fit, or one is
            missing.
    """
    if text is None:
        if lone := next(iter(options), None):
            raise InputError(f"compressor option {lone!r} is given without --compress; give both")
        return None
    name, colon, first = text.partition(":")
    cls = compressor_class(name)
    names = [field.name for field in fields(cls)]
    given = [*([f"{names[0]}={first}"] if colon else []), *options]
    values = values_from_text(cls, f"compressor {name}", given)
    for field in fields(cls):
        if field.default is MISSING and field.name not in values:
            raise InputError(
                f"compressor {name} is given without its {field.name}; expected it behind a "
                f"colon, such as {name}:12x12"
            )
    return cls(**values)
