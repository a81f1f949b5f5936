"""Plans of reducers that rank tokens, and the similarity by which some find a token's heir."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from tome_export.merge.lowering import accumulate_dtype, by_position, rank
from tome_export.merge.plan import MergePlan
from tome_export.merge.spec import NORM_EPS


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
    batch, tokens = order.shape
    stay = by_position(order[:, : tokens - r])
    first = torch.arange(prefix, device=order.device).expand(batch, -1)
    keep = torch.cat([first, stay + prefix], dim=1).int()
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
    wide = x.to(accumulate_dtype(x))
    unit = functional.normalize(wide, dim=-1, eps=NORM_EPS)
    return unit @ unit.transpose(1, 2)
