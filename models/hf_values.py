"""Values of a checkpoint's JSON files, checked: each refusal is one line. Imports nothing heavy."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from tome_export.errors import InputError

_HALVES = ("vision_config", "text_config")


def object_at(config: Mapping[str, Any], key: str, where: str) -> dict[str, Any]:
    """The JSON object under a key of ``config.json``; empty where there is none.

    Raises:
        InputError: if there is something else.
    """
    found = config.get(key)
    if found is not None and not isinstance(found, dict):
        raise InputError(f"config.json of {where}: {key} is {found!r}; expected a JSON object")
    return dict(found or {})


def whole(value: object, what: str) -> int:
    """A size or count, at least 1.

    Args:
        value: As it was read.
        what: File and key, for the message.

    Raises:
        InputError: if it is something else.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise InputError(f"{what} is {value!r}; expected a whole number, 1 or more")
    return value


def positive(value: object, what: str) -> float:
    """A finite number above 0; a whole one will do. See ``whole``.

    Raises:
        InputError: if it is something else.
    """
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not 0 < value < math.inf:  # type: ignore[operator]
        raise InputError(f"{what} is {value!r}; expected a number above 0")
    return float(value)  # type: ignore[arg-type]


def name_at(config: Mapping[str, Any], key: str, where: str, default: str) -> str:
    """The string under a key of ``config.json``, or the default where there is none.

    Raises:
        InputError: if there is something else.
    """
    found = config.get(key)
    if found is not None and not isinstance(found, str):
        raise InputError(f"config.json of {where}: {key} is {found!r}; expected a name")
    return found or default


def refuse_quantised(config: Mapping[str, Any], where: str) -> None:
    """Refuse a checkpoint whose weights are codes of a quantisation.

    Args:
        config: Content of its ``config.json``.
        where: Name of the checkpoint, for the message.

    Raises:
        InputError: if it, or one of its halves, says so.
    """
    halves = (object_at(config, key, where) for key in _HALVES)
    if any(half.get("quantization_config") for half in (config, *halves)):
        raise InputError(
            f"weights of {where} are quantised (quantization_config in config.json), which is not "
            "supported; use the checkpoint in float32, float16 or bfloat16"
        )


def attention_of(*configs: Mapping[str, Any]) -> str | None:
    """The attention implementation that the first of some configurations names, if one does."""
    for config in configs:
        found = config.get("_attn_implementation") or config.get("attn_implementation")
        # One for each half.
        if isinstance(found, dict):
            found = found.get("vision_config") or found.get("")
        if found:
            return str(found)
    return None


def clip_vision_half(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The vision half of a CLIP model's configuration, in the form of old files too.

    The library lets ``vision_config_dict`` and its defaults go before ``vision_config``.

    Raises:
        InputError: if it is no JSON object.
    """
    old = config.get("vision_config_dict") is not None
    return object_at(config, "vision_config_dict" if old else "vision_config", where)


def reason_of(error: Exception) -> str:
    """What an error of the library says, in one line."""
    text = " ".join(str(error).split()) or type(error).__name__
    return f"unknown {text}" if isinstance(error, KeyError) else text
