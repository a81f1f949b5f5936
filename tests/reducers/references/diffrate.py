"""DiffRate from its paper, section 3.2, and the authors' rules for means and sizes, in loops."""

from __future__ import annotations

from references.attention import class_attention, from_most_to_least
from references.vectors import cosine, first_largest


def counts(tokens, prefix, prune_kept, merge_kept):
    """Tokens that every layer removes."""
    removed = []
    for prune, merge in zip(prune_kept, merge_kept, strict=True):
        left = tokens
        if prune < left:
            left = prune
        if merge < left:
            left = merge
        left = min(tokens, max(left, prefix + 1))
        removed.append(tokens - left)
        tokens = left
    return removed


def plan(layer, prune_kept=None):
    ranked = from_most_to_least(class_attention(layer), range(layer.prefix, len(layer.x)))
    gone = []
    while prune_kept and layer.prefix + len(ranked) > prune_kept[layer.layer]:
        if len(gone) == layer.r:
            break
        gone.insert(0, ranked.pop())
    merging = layer.r - len(gone)
    stay = sorted(ranked[: len(ranked) - merging])
    src = ranked[len(stay) :]
    dst = [
        layer.prefix + first_largest([cosine(layer.x[token], layer.x[other]) for other in stay])
        for token in src
    ]
    return [*range(layer.prefix), *stay], src + gone, dst + [-1] * len(gone)


def tokens(layer, prune_kept=None):
    """Tokens and sizes behind the layer."""
    keep, src, dst = plan(layer, prune_kept)
    x, sizes = [], []
    for place, token in enumerate(keep):
        members = [s for s, d in zip(src, dst, strict=True) if d == place]
        rows = [layer.x[i] for i in (token, *members)]
        x.append([sum(column) / len(rows) for column in zip(*rows, strict=True)])
        grown = [layer.size[i] * max(0, cosine(layer.x[i], layer.x[token])) for i in members]
        sizes.append(layer.size[token] + sum(grown))
    return x, sizes
