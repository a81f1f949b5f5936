"""Relevance to a query and where the irrelevant go, for one image in loops."""

from __future__ import annotations

from references.vectors import cosine, first_largest


def relevance(token, query, weight=None, bias=None):
    if weight is not None:
        offsets = bias or [0.0] * len(weight)
        pairs = zip(weight, offsets, strict=True)
        token = [sum(map(float.__mul__, row, token)) + offset for row, offset in pairs]
    return cosine(token, query)


def plan(layer, weight=None, bias=None, *, merge=False):
    query = layer.inputs["query"]
    patches = range(layer.prefix, len(layer.x))
    scores = {i: relevance(layer.x[i], query, weight, bias) for i in patches}
    ranked = sorted(patches, key=lambda i: (-scores[i], i))
    stay, src = sorted(ranked[: len(ranked) - layer.r]), ranked[len(ranked) - layer.r :]
    keep = [*range(layer.prefix), *stay]
    if not merge:
        return keep, src, [-1] * len(src)
    keys = [
        [sum(values) / len(layer.keys) for values in zip(*(head[i] for head in layer.keys))]  # noqa: B905
        for i in range(len(layer.x))
    ]
    nearest = [first_largest([cosine(keys[i], keys[j]) for j in stay]) for i in src]
    return keep, src, [layer.prefix + place for place in nearest]
