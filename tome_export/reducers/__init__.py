"""Reducers: ways to make fewer tokens of many. One file each, a line in ``REDUCERS`` each."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

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


def reducer_class(name: str) -> type[Reducer]:
    """The class of a reducer.

    Raises:
        InputError: if there is none of that name.
    """
    if name not in REDUCERS:
        raise InputError(f"reducer is {name!r}; expected one of {', '.join(REDUCERS)}")
    module, _, cls = REDUCERS[name].partition(".")
    found: type[Reducer] = getattr(importlib.import_module(f"{__name__}.{module}"), cls)
    return found
