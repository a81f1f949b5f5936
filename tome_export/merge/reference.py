"""The slow, obvious oracle: explicit loops in float64, written apart from the fast path.

Tests and benchmarks import it; nothing in production does.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class ReferencePlan:
    """A plan of one image as plain lists; fields as in ``MergePlan``."""

    keep: list[int]
    src: list[int]
    dst: list[int]


def cosine_scores(metric: Sequence[Sequence[float]], prefix: int) -> dict[tuple[int, int], float]:
    """Cosine similarity of every allowed pair (even token, odd token), keyed by token index.

    A token whose norm is not finite in fp32 counts as the zero vector.
    """
    metric = [_direction(row) for row in metric]
    # The contract's bound, per vector: a zero vector scores 0.
    norms = [max(math.sqrt(math.fsum(v * v for v in row)), 1e-12) for row in metric]
    scores = {}
    for a in range(0, len(metric), 2):
        for b in range(1, len(metric), 2):
            if a >= prefix and b >= prefix:
                dot = math.fsum(p * q for p, q in zip(metric[a], metric[b], strict=True))
                scores[a, b] = dot / (norms[a] * norms[b])
    return scores


def _direction(row: Sequence[float]) -> Sequence[float]:
    # Squares of 2^64 and more overflow fp32.
    return row if math.hypot(*row) < 2.0**64 else [0.0] * len(row)


def mean_keys(keys: Sequence[Sequence[Sequence[float]]]) -> list[list[float]]:
    """The metric of one image: ``keys``, H heads of N rows of D numbers, averaged over heads."""
    return [
        [sum(values) / len(keys) for values in zip(*rows, strict=True)]
        for rows in zip(*keys, strict=True)
    ]


def match(
    metric: Sequence[Sequence[float]], r: int, prefix: int, class_token: bool
) -> ReferencePlan:
    """Bipartite soft matching of one image (ToMe, section 3.1).

    Args:
        metric: N rows of D numbers, which may be infinite or NaN.
        r: Tokens to merge, already clamped.
        prefix: Protected tokens at the front.
        class_token: Whether one of them is a class token.
    """
    tokens = len(metric)
    scores = cosine_scores(metric, prefix)
    pairs = []
    for a in range(0, tokens, 2):
        candidates = [(-score, b) for (row, b), score in scores.items() if row == a]
        if candidates:
            negative, b = min(candidates)
            pairs.append((negative, a, b))
    pairs.sort()
    folded, staying = pairs[:r], [a for _, a, _ in pairs[r:]]
    if class_token:
        staying.sort()
    keep = list(range(prefix)) + staying + [b for b in range(1, tokens, 2) if b >= prefix]
    position = {token: index for index, token in enumerate(keep)}
    return ReferencePlan(keep, [a for _, a, _ in folded], [position[b] for _, _, b in folded])


def merge(
    x: Sequence[Sequence[float]], size: Sequence[float], plan: ReferencePlan
) -> tuple[list[list[float]], list[float]]:
    """Size-weighted mean of one image's tokens; returns the merged rows and sizes."""
    groups = [[token] for token in plan.keep]
    for token, position in zip(plan.src, plan.dst, strict=True):
        groups[position].append(token)
    rows, sizes = [], []
    for group in groups:
        total = math.fsum(size[token] for token in group)
        sizes.append(total)
        width = range(len(x[group[0]]))
        rows.append([math.fsum(x[t][c] * size[t] for t in group) / total for c in width])
    return rows, sizes
