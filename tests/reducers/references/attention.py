"""The class token's attention and the ranking by it, for one image in loops of float64."""

from __future__ import annotations

import math


def class_attention(layer):
    """What the class token attends to, the mean over heads: one number per token."""
    heads = []
    for queries, keys in zip(layer.queries, layer.keys, strict=True):
        logits = [layer.scale * sum(map(float.__mul__, queries[0], key)) for key in keys]
        if layer.bias is not None:
            logits = [a + b for a, b in zip(logits, layer.bias, strict=True)]
        top = max(logits)
        shares = [math.exp(logit - top) for logit in logits]
        heads.append([share / sum(shares) for share in shares])
    return [sum(column) / len(heads) for column in zip(*heads, strict=True)]


def from_most_to_least(scores, tokens):
    """Tokens by falling score; of equal ones the first comes first."""
    return sorted(tokens, key=lambda token: (-scores[token], token))
