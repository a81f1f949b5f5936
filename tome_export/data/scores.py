"""Logits to scores; also runs inside the server, beside its model. Needs NumPy only."""

from __future__ import annotations

from typing import Any

import numpy as np

TOP_K = 5
"""Labels per image where nobody says otherwise, and there are as many classes."""


def count_of(k: int, classes: int, activation: str) -> int:
    """How many labels are told: of a regression every number, as none is better than another."""
    return classes if activation == "none" else min(k, classes)


def top_k(
    logits: np.ndarray[Any, Any], k: int, activation: str = "softmax"
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """The k best classes of finite ``logits [B, K]``: index int32 and score float32 ``[B, k]``.

    Of equal logits the lower index comes first. The score is the softmax over all K classes; the
    sigmoid of each logit where classes do not exclude each other, or there is one; or the number
    itself of a regression, whose outputs keep their order.
    """
    wide = logits.astype(np.float64)
    if activation == "none":
        index = np.broadcast_to(np.arange(k), (len(logits), k))
    else:
        index = np.argsort(-logits, axis=1, kind="stable")[:, :k]
    if activation == "softmax":
        powers = np.exp(wide - wide.max(axis=1, keepdims=True))
        wide = powers / powers.sum(axis=1, keepdims=True)
    elif activation == "sigmoid":
        wide = (1 + np.tanh(wide / 2)) / 2  # which overflows for no logit
    best = np.take_along_axis(wide, index, axis=1)
    return index.astype(np.int32), best.astype(np.float32)
