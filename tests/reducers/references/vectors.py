"""Vectors as lists, for references."""

from __future__ import annotations

import math


def cosine(a: list[float], b: list[float]) -> float:
    """0 if one of them has no length."""
    lengths = math.hypot(*a) * math.hypot(*b)
    return math.fsum(x * y for x, y in zip(a, b, strict=True)) / lengths if lengths else 0.0


def first_largest(values: list[float]) -> int:
    """The index of the largest; of equal ones the first."""
    best = 0
    for index, value in enumerate(values):
        if value > values[best]:
            best = index
    return best


def ranked(values: list[float]) -> list[int]:
    """Indices from the largest to the smallest; of equal ones the first first."""
    return sorted(range(len(values)), key=lambda index: (-values[index], index))
