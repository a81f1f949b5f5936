"""Plans of reducers that rank tokens, and the similarity by which some find a token's heir."""

from __future__ import annotations

import torch
from torch import Tensor

from tome_export.merge.lowering import (
    accumulate_dtype,
    behind_prefix,
    by_position,
    rank,
    unit_vectors,
)
from tome_export.merge.plan import MergePlan


def ranked_plan(
    scores: Tensor, prefix: int, r: int, alike: Tensor | None = None, merging: int = 0
) -> MergePlan:
    """The r lowest scores go, what stays is in order of position.

    Args:
        scores: ``[B, n]``, of the tokens behind the prefix.
        prefix: Protected tokens P.
        r: Tokens that go.
        alike: ``[B, n, n]``, how similar these tokens are; needed where any merge.
        merging: Of the r tokens the best so many go into the most similar token that stays; the
            others are dropped.
    """
    order = rank(scores)
    tokens = order.shape[1]
    stay = by_position(order[:, : tokens - r])
    keep = behind_prefix(stay, prefix).int()
    src = (order[:, tokens - r :] + prefix).int()
    if alike is None or merging == 0:
        return MergePlan(keep, src, torch.full_like(src, -1))
    rows = order[:, tokens - r : tokens - r + merging]
    among = alike.gather(1, rows[..., None].expand(-1, -1, tokens))
    best = among.gather(2, stay[:, None].expand(-1, merging, -1)).argmax(dim=-1)
    dst = (best + prefix).int()
    if merging < r:
        dst = torch.cat([dst, torch.full_like(src[:, merging:], -1)], dim=1)
    return MergePlan(keep, src, dst)


def cosines(x: Tensor) -> Tensor:
    """Cosine of every pair of tokens, ``[B, n, D] -> [B, n, n]`` float32 (float64 for float64)."""
    unit = unit_vectors(x.to(accumulate_dtype(x)))
    return unit @ unit.transpose(1, 2)
