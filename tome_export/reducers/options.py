"""Options of reducers: read from text or from JSON, checked by the fields of the reducer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import Field, fields
from typing import Any

from tome_export.errors import InputError
from tome_export.reducers import DEFAULT, reducer_class
from tome_export.reducers.base import Reducer

_READERS: dict[str, tuple[Any, str]] = {
    "int": (int, "a whole number"),
    "float": (float, "a number"),
    "str": (str, "text"),
    "str | None": (str, "text"),
    "bool": (lambda text: {"on": True, "off": False}[text], "on or off"),
    "tuple[int, ...]": (
        lambda text: tuple(int(part) for part in text.split(",")),
        "whole numbers such as 3,6,9",
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
    values: dict[str, Any] = {}
    for option in options:
        key, equals, text = option.partition("=")
        if not equals:
            raise InputError(f"option of reducer {name} is {option!r}; expected KEY=VALUE")
        if key in values:
            raise InputError(f"option {key} of reducer {name} is given twice; give it once")
        read, expected = _READERS[str(_field(cls, key).type)]
        try:
            values[key] = read(text)
        except (ValueError, KeyError):
            raise InputError(
                f"option {key} of reducer {name} is {text!r}; expected {expected}"
            ) from None
    return cls(**values)


def reducer_from_json(entry: Mapping[str, Any] | None) -> Reducer:
    """The reducer of a manifest's entry ``{"name", "options"}``; the default one for None."""
    if entry is None:  # artifacts of before have one reducer
        return reducer_class(DEFAULT)()
    cls = reducer_class(entry["name"])
    return cls(**{_field(cls, key).name: _tuples(v) for key, v in entry["options"].items()})


def json_from_reducer(reducer: Reducer) -> dict[str, Any]:
    """Inverse of ``reducer_from_json``."""
    return {"name": reducer.name, "options": reducer.options()}


def _field(cls: type[Reducer], key: str) -> Field[Any]:
    known = {field.name: field for field in fields(cls)}
    if key not in known:
        expected = f"expected {', '.join(known)}" if known else "it has none"
        raise InputError(f"reducer {cls.name} has no option {key!r}; {expected}")
    return known[key]


def _tuples(value: Any) -> Any:
    return tuple(_tuples(part) for part in value) if isinstance(value, list) else value
