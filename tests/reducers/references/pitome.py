"""PiToMe from its formula, for one image in loops."""

from __future__ import annotations

import math
from types import SimpleNamespace

from references.vectors import cosine, first_largest, ranked

from tome_export.merge.reference import mean_keys


def elu(value: float, alpha: float) -> float:
    return value if value >= 0 else alpha * (math.exp(value) - 1)


def plan(seen: SimpleNamespace, margin: float = 0.9, alpha: float = 1.0, split: str = "none"):
    tokens = len(seen.size)
    patches = list(range(seen.prefix, tokens))
    keys = mean_keys(seen.keys)
    alike = {(i, j): cosine(keys[i], keys[j]) for i in patches for j in patches}
    m = margin - margin * seen.layer / seen.depth
    energy = [sum(elu(alike[i, j] - m, alpha) for j in patches) / len(patches) for i in patches]
    order = [patches[index] for index in ranked(energy)]
    early = seen.layer < (seen.depth + 1) // 2
    everything = {"none": False, "deit": early, "mae": not early}[split]
    mergeable = order if everything else order[: 2 * seen.r]
    src, partners = mergeable[::2], sorted(mergeable[1::2])
    best = {a: partners[first_largest([alike[a, b] for b in partners])] for a in src}
    if everything:
        places = sorted(src)
        src = [places[i] for i in ranked([alike[a, best[a]] for a in places])][: seen.r]
    into = [best[a] for a in src]
    keep = [token for token in range(tokens) if token not in src]
    return keep, src, [keep.index(token) for token in into]
