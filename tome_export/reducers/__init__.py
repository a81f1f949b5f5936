"""Reducers: ways to make fewer tokens of many. One file each, a line in ``REDUCERS`` each."""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from tome_export.errors import InputError

if TYPE_CHECKING:
    from tome_export.reducers.base import Reducer

REDUCERS = {
    "tome": "tome.ToMe",
    "pitome": "pitome.PiToMe",
    "tofu": "tofu.ToFu",
    "kth": "kth.Kth",
    "random": "random_partition.RandomPartition",
    "dtem": "dtem.DTEM",
    "evit": "evit.EViT",
    "topk": "topk.TopK",
    "diffrate": "diffrate.DiffRate",
    "dynamicvit": "dynamicvit.DynamicViT",
    "query": "query.Query",
}
"""Name -> module of this package and class."""

DEFAULT = "tome"


def _numbers(kind: type[float]) -> Any:
    return lambda text: tuple(kind(part) for part in text.split(","))


_READERS: dict[str, tuple[Any, str]] = {
    "int": (int, "a whole number"),
    "float": (float, "a number"),
    "str": (str, "text"),
    "bool": ({"on": True, "off": False}.__getitem__, "on or off"),
    "tuple[int, ...]": (_numbers(int), "whole numbers such as 3,6,9"),
    "tuple[float, ...]": (_numbers(float), "numbers such as 0.7,0.5,0.3"),
    "tuple[int, int]": (
        lambda text: (int(text.partition("x")[0]), int(text.partition("x")[2])),
        "two numbers such as 12x12",
    ),
}
"""Type of an option -> how it is read from text, and what is expected."""


def class_of(registry: Mapping[str, str], package: str, kind: str, name: str) -> type[Any]:
    """The class that a registry names."""
    if name not in registry:
        raise InputError(f"{kind} is {name!r}; expected one of {', '.join(registry)}")
    module, _, cls = registry[name].partition(".")
    found: type[Any] = getattr(importlib.import_module(f"{package}.{module}"), cls)
    return found


def reducer_class(name: str) -> type[Reducer]:
    """The class of a reducer."""
    return class_of(REDUCERS, __name__, "reducer", name)


def reducer_from_text(name: str = DEFAULT, options: Iterable[str] = ()) -> Reducer:
    """A reducer by name with options as the command line has them, each ``key=value``."""
    cls = reducer_class(name)
    return cls(**values_from_text(cls, f"reducer {name}", options))


def values_from_text(cls: type[Any], what: str, options: Iterable[str]) -> dict[str, Any]:
    """Options of the command line, each ``key=value``, as values of a dataclass's fields."""
    types = {field.name: str(field.type).removesuffix(" | None") for field in fields(cls)}
    values: dict[str, Any] = {}
    for option in options:
        key, equals, text = option.partition("=")
        if not equals:
            raise InputError(f"option of {what} is {option!r}; expected KEY=VALUE")
        if key in values:
            raise InputError(f"option {key} of {what} is given twice; give it once")
        if key not in types:
            expected = f"expected {', '.join(types)}" if types else "it has none"
            raise InputError(f"{what} has no option {key!r}; {expected}")
        read, expected = _READERS[types[key]]
        try:
            values[key] = read(text)
        except (ValueError, KeyError):
            raise InputError(f"option {key} of {what} is {text!r}; expected {expected}") from None
    return values
