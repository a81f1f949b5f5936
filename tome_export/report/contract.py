"""What the reports of ``check``, ``bench``, ``eval`` and ``tune`` must hold to be shown."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tome_export.errors import InputError

FORMAT = 1
"""Version of these files, where they state one."""


@dataclass(frozen=True)
class Maybe:
    """A value of this shape, null, or nothing at all."""

    of: Any


@dataclass(frozen=True)
class Each:
    """An object with free names, whose values all have one shape."""

    of: Any


NUMBER = int | float

QUANTILES = {"p20": NUMBER, "p50": NUMBER, "p80": NUMBER}
TIMED = {"latency_ms": QUANTILES, "throughput": NUMBER, "peak_memory_bytes": Maybe(NUMBER)}
PROFILE = {"groups_ms": Each(NUMBER), "layers": [{"layer": int}]}
ENVIRONMENT = Maybe(
    {
        "cpu": Maybe(str),
        "cores": Maybe(int),
        "gpu": Maybe(str),
        "driver": Maybe(str),
        "python": Maybe(str),
        "versions": Maybe(Each(Maybe(str))),
        "date": Maybe(str),
    }
)
SHARE = {"correct": int, "share": NUMBER, "low": NUMBER, "high": NUMBER}
DIFFERENCE = {"share": NUMBER, "low": NUMBER, "high": NUMBER}
OUTPUT = {name: Maybe(NUMBER) for name in ("max_abs", "relative", "cosine", "top1_agreement")}
POINT = {"macs": NUMBER, "latency_ms": Maybe(NUMBER), "accuracy": NUMBER}

CHECK = {
    "passed": bool,
    "failures": [str],
    "candidate": str,
    "precision": str,
    "images": int,
    "k": NUMBER,
    "decisions": int,
    "disagreements": int,
    "defects": int,
    "first_diverging_layer": Maybe(int),
    "layers": [
        {
            "layer": int,
            "decisions": int,
            "disagreements": int,
            "defects": int,
            "op_defects": int,
            "largest_margin": Maybe(NUMBER),
            "margin_bound": Maybe(NUMBER),
            "score_error": Maybe(NUMBER),
            "score_error_allowed": Maybe(NUMBER),
            "images_diverged": int,
            "examples": [{"image": int, "token": int, "kind": str, "margin": Maybe(NUMBER)}],
        }
    ],
    "output": OUTPUT,
    "led_output": OUTPUT,
    "led_allowed": Maybe(NUMBER),
    "twin_difference": Maybe(NUMBER),
    "twin_allowed": Maybe(NUMBER),
}

CONTRACTS: dict[str, tuple[str, Any]] = {
    "parity.json": ("check", {"checks": [CHECK]}),
    "bench.json": (
        "bench",
        {
            "environment": ENVIRONMENT,
            "against": str,
            "macs_ratio": NUMBER,
            "rounds": Maybe(int),
            "warmup": Maybe(int),
            "rows": [
                {
                    "backend": str,
                    "batch": int,
                    "merged": TIMED,
                    "against": TIMED,
                    "speedup": QUANTILES,
                    "share_of_macs_limit": NUMBER,
                }
            ],
            "profile": Maybe(
                [
                    {
                        "backend": str,
                        "batch": int,
                        "total_ms": NUMBER,
                        "attributed_share": NUMBER,
                        "merged": PROFILE,
                        "against": Maybe(PROFILE),
                    }
                ]
            ),
        },
    ),
    "eval.json": (
        "eval",
        {
            "data": {
                "source": str,
                "kind": str,
                "images": int,
                "unreadable": Maybe([{"name": str, "reason": str}]),
                "unreadable_count": Maybe(int),
            },
            "candidates": [
                {
                    "name": str,
                    "backend": str,
                    "macs": NUMBER,
                    "top1": Maybe(SHARE),
                    "top5": Maybe(SHARE),
                    "difference_to_unmerged": Maybe(DIFFERENCE),
                    "agreement_with_unmerged": Maybe(SHARE),
                    "cosine_to_unmerged": Maybe({"mean": NUMBER, "min": NUMBER}),
                    "not_finite": Maybe(int),
                }
            ],
            "confidence": NUMBER,
            "environment": ENVIRONMENT,
        },
    ),
    "schedule.json": (
        "tune",
        {
            "format": int,
            "schedule": [int],
            "objective": {"kind": str, "value": NUMBER, "metric": str},
            "unmerged": POINT,
            "front": [{"schedule": [int], "method": str, "chosen": bool, **POINT}],
            "images": Maybe(int),
            "seconds": Maybe(NUMBER),
            "environment": ENVIRONMENT,
        },
    ),
}
"""File in the artifact -> the command that writes it, and what is read of it."""

_NAMES = {str: "text", bool: "true or false", int: "a whole number", NUMBER: "a finite number"}


def read_report(file: Path) -> dict[str, Any] | None:
    """Read one of the files of ``CONTRACTS``, by its name.

    Returns:
        Its content; None for a schedule without the search that found it, as written by hand.

    Raises:
        InputError: if it is not JSON, of a later format, or lacks what is shown of it.
    """
    command, shape = CONTRACTS[file.name]
    again = f"run 'tome-export {command}' of this version again"
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file} is not valid JSON ({error}); {again}") from error
    if isinstance(values, dict) and values.get("format", FORMAT) != FORMAT:
        raise InputError(
            f"{file} has format {values['format']!r}; this version reads format {FORMAT}, {again}"
        )
    if command == "tune" and isinstance(values, dict) and not is_searched(values):
        return None
    wrong = next(_wrong(values, shape, ""), None)
    if wrong:
        raise InputError(f"{file} {wrong}; {again}")
    return dict(values)


def is_searched(values: Mapping[str, Any]) -> bool:
    """Whether a schedule file is what ``tune`` wrote; one written by hand has nothing to show."""
    return "front" in values or "objective" in values


def _wrong(value: Any, shape: Any, where: str) -> Iterator[str]:
    """What in a value is not of a shape; ``where`` is its path."""
    if isinstance(shape, Maybe):
        if value is not None:
            yield from _wrong(value, shape.of, where)
        return
    if isinstance(shape, dict | Each | list):
        kind = list if isinstance(shape, list) else dict
        if not isinstance(value, kind):
            expected = "a list" if kind is list else "an object"
            place = f" as {where}" if where else ""
            yield f"has {_short(value)}{place}, expected {expected}"
        elif isinstance(shape, dict) and isinstance(value, dict):
            for name, inner in shape.items():
                inside = f"{where}.{name}" if where else name
                if name not in value and not isinstance(inner, Maybe):
                    yield f"has no {inside}"
                else:
                    yield from _wrong(value.get(name), inner, inside)
        else:
            items = value.items() if isinstance(value, dict) else enumerate(value)
            of: Any = shape.of if isinstance(shape, Each) else shape[0]
            for name, item in items:
                yield from _wrong(item, of, f"{where}[{name!r}]")
    elif not _is(value, shape):
        yield f"has {_short(value)} as {where}, expected {_NAMES[shape]}"


def _is(value: Any, shape: Any) -> bool:
    # In Python true and false are whole numbers too.
    if not isinstance(value, shape) or (shape is not bool and isinstance(value, bool)):
        return False
    return not isinstance(value, float) or math.isfinite(value)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
