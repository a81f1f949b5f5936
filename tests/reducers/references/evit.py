"""EViT from its paper, sections 3.1 and 3.2, for one image in loops; with and without fusion."""

from __future__ import annotations

import math

from references.attention import class_attention, from_most_to_least


def plan(layer):
    """The best stay in order, the best of the rest is last, and the others go into it."""
    stay, rest = split(layer, layer.r + 1)
    last = layer.prefix + len(stay)
    return [*range(layer.prefix), *stay, rest[0]], rest[1:], [last] * (len(rest) - 1)


def topk(layer):
    """The best stay in order, the others are gone."""
    stay, rest = split(layer, layer.r)
    return [*range(layer.prefix), *stay], rest, [-1] * len(rest)


def split(layer, rest):
    """Tokens that stay by position, and the ``rest`` least attended by falling attention."""
    ranked = from_most_to_least(class_attention(layer), range(layer.prefix, len(layer.x)))
    cut = len(ranked) - rest
    return sorted(ranked[:cut]), ranked[cut:]


def tokens(layer):
    """Tokens and sizes behind the layer: the fused one is the sum of attention times token."""
    attention = class_attention(layer)
    stay, rest = split(layer, layer.r + 1)
    fused = [sum(attention[i] * layer.x[i][c] for i in rest) for c in range(len(layer.x[0]))]
    kept = [*range(layer.prefix), *stay]
    sizes = [layer.size[i] for i in kept] + [sum(layer.size[i] for i in rest)]
    return [layer.x[i] for i in kept] + [fused], sizes


def counts(depth, patches, keep, stages, *, fused):
    """Tokens that each layer removes: of those behind the prefix ``ceil(keep n)`` stay."""
    removed, n = [0] * depth, patches
    for stage, rate in zip(stages, keep, strict=True):
        stay = math.ceil(rate * n)
        behind = min(n, stay + 1) if fused else stay
        removed[stage] = n - behind
        n = behind
    return removed
