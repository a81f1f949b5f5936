"""Token Fusion from its paper, for one image in loops."""

from __future__ import annotations

import math
from types import SimpleNamespace

from tome_export.merge.reference import match, mean_keys


def plan(seen: SimpleNamespace):
    found = match(mean_keys(seen.keys), seen.r, seen.prefix, seen.class_token)
    return found.keep, found.src, found.dst


def tokens(seen: SimpleNamespace, prune: float = 0.5):
    """Tokens and sizes behind the plan."""
    keep, src, dst = plan(seen)
    groups = [[token] for token in keep]
    for token, place in zip(src, dst, strict=True):
        groups[place].append(token)
    rows = [mlerp([seen.x[token] for token in group]) for group in groups]
    if seen.layer < prune * seen.depth:
        rows = [seen.x[token] for token in keep]
    return rows, [sum(seen.size[token] for token in group) for group in groups]


def mlerp(group: list[list[float]]) -> list[float]:
    mean = [math.fsum(column) / len(group) for column in zip(*group, strict=True)]
    largest = max(math.hypot(*row) for row in group)
    return [value / math.hypot(*mean) * largest for value in mean]
