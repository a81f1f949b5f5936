"""Options of reducers: read from text, checked by the fields of the reducer."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import Field, fields
from typing import Any

from tome_export.errors import InputError
from tome_export.reducers import DEFAULT, reducer_class
from tome_export.reducers.base import Reducer

_READERS: dict[str, tuple[Any, str]] = {
    "int": (int, "a whole number"),
    "int | None": (int, "a whole number"),
    "float": (float, "a number"),
    "str": (str, "text"),
    "str | None": (str, "text"),
    "bool": (lambda text: {"on": True, "off": False}[text], "on or off"),
    "tuple[int, ...]": (
        lambda text: tuple(int(part) for part in text.split(",")),
        "whole numbers such as 3,6,9",
    ),
    "tuple[int, int]": (
        lambda text: (int(text.partition("x")[0]), int(text.partition("x")[2])),
        "two numbers such as 12x12",
    ),
    "tuple[float, ...]": (
        lambda text: tuple(float(part) for part in text.split(",")),
        "numbers such as 0.7,0.5,0.3",
    ),
}


def reducer_from_text(name: str = DEFAULT, options: Iterable[str] = ()) -> Reducer:
    """A reducer by name with options as the command line has them, each ``key=value``.

    Raises:
        InputError: if there is no such reducer or option, or a value does not fit.
    """
    cls = reducer_class(name)
    return cls(**values_from_text(cls, f"reducer {name}", options))


def values_from_text(cls: type[Any], what: str, options: Iterable[str]) -> dict[str, Any]:
    """Options of the command line, each ``key=value``, as values of a dataclass's fields.

    Args:
        cls: The dataclass.
        what: What the options are of, for messages.
        options: As given.

    Raises:
        InputError: if there is no such option, or a value does not fit.
    """
    values: dict[str, Any] = {}
    for option in options:
        key, equals, text = option.partition("=")
        if not equals:
            raise InputError(f"option of {what} is {option!r}; expected KEY=VALUE")
        if key in values:
            raise InputError(f"option {key} of {what} is given twice; give it once")
        read, expected = _READERS[str(_field(cls, what, key).type)]
        try:
            values[key] = read(text)
        except (ValueError, KeyError):
            raise InputError(f"option {key} of {what} is {text!r}; expected {expected}") from None
    return values


def json_from_reducer(reducer: Reducer) -> dict[str, Any]:
    """Name and options, as a manifest records them."""
    return {"name": reducer.name, "options": reducer.options()}


def _field(cls: type[Any], what: str, key: str) -> Field[Any]:
    known = {field.name: field for field in fields(cls)}
    if key not in known:
        expected = f"expected {', '.join(known)}" if known else "it has none"
        raise InputError(f"{what} has no option {key!r}; {expected}")
    return known[key]
