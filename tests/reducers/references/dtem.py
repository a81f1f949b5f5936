"""DTEM from its paper, section 3.2, for one image in loops: a linear metric, then ToMe."""

from __future__ import annotations

import math
from types import SimpleNamespace

from tome_export.merge.reference import match


def plan(seen: SimpleNamespace, state: dict[str, list]):
    """``state`` has the weights as lists, by the keys of the authors' checkpoints."""
    prefix = f"blocks.{seen.layer}.attn.qkv.metric_layer."
    rows = list(zip(state[prefix + "weight"], state[prefix + "bias"], strict=True))
    metric = [
        [math.fsum(w * v for w, v in zip(row, token, strict=True)) + bias for row, bias in rows]
        for token in seen.tokens
    ]
    found = match(metric, seen.r, seen.prefix, seen.class_token)
    return found.keep, found.src, found.dst
