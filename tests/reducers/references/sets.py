"""ToMe's other partitions, for one image in loops: A and B fixed, the r best pairs merge."""

from __future__ import annotations

import random
from types import SimpleNamespace

from references.vectors import cosine, first_largest, ranked

from tome_export.merge.reference import mean_keys


def kth(seen: SimpleNamespace, k: int = 4):
    """B is the last of every whole group of k."""
    b = [token for token in patches_of(seen) if (token - seen.prefix) % k == k - 1]
    return merged(seen, b)


def drawn(seen: SimpleNamespace, seed: int = 0):
    """A is the r patches with the smallest draws."""
    source = random.Random(f"{seed}/{seen.layer}")  # noqa: S311 (no secret)
    numbers = {token: source.random() for token in patches_of(seen)}
    b = sorted(numbers, key=numbers.get)[seen.r :]
    return merged(seen, sorted(b))


def patches_of(seen: SimpleNamespace) -> list[int]:
    return list(range(seen.prefix, len(seen.size)))


def merged(seen: SimpleNamespace, b: list[int]):
    keys = mean_keys(seen.keys)
    a = [token for token in patches_of(seen) if token not in b]
    pairs = []
    for token in a:
        scores = [cosine(keys[token], keys[other]) for other in b]
        best = first_largest(scores)
        pairs.append((scores[best], token, b[best]))
    chosen = [pairs[index] for index in ranked([score for score, _, _ in pairs])][: seen.r]
    src = [token for _, token, _ in chosen]
    keep = [token for token in range(len(seen.size)) if token not in src]
    return keep, src, [keep.index(into) for _, _, into in chosen]
