"""Keep the tokens that the class token attends to most, drop the others (arXiv 2202.07800)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tome_export.merge.lowering import by_position, rank
from tome_export.merge.plan import MergePlan
from tome_export.reducers.base import Place, ScoredReducer, Seen, kept_tokens


@dataclass(frozen=True)
class TopK(ScoredReducer):
    """Of N - P tokens the r with the least class attention are dropped; the rest keep their order.

    The score of token i is the mean over heads of the class token's attention to it (EViT, section
    3.1, without the fused token). Models without a class token cannot use it. Dropped tokens leave
    nothing behind, so there are no dense outputs, and proportional attention has nothing to weigh.
    """

    name = "topk"
    summary = "drop the tokens with the least class attention"
    source = "EViT: Expediting Vision Transformers via Token Reorganizations, arXiv 2202.07800"
    drops = True
    prop_attn = False
    attention = True

    def limit(self, tokens: int, prefix: int) -> int:
        """All patches but one."""
        return max(0, tokens - prefix - 1)

    def signals(self, seen: Seen) -> tuple[Tensor, ...]:
        """Class attention ``[B, N - P]``."""
        return (seen.class_attention[:, seen.prefix :],)

    def plan(self, signals: tuple[Tensor, ...], place: Place) -> MergePlan:
        """Rank, cut, and put what stays in order of position."""
        order = rank(signals[0]) + place.prefix
        kept = order.shape[1] - place.r
        first = torch.arange(place.prefix, device=order.device).expand(order.shape[0], -1)
        keep = torch.cat([first, by_position(order[:, :kept])], dim=1).int()
        src = order[:, kept:].int()
        return MergePlan(keep, src, torch.full_like(src, -1))

    def apply(self, seen: Seen, plan: MergePlan) -> tuple[Tensor, Tensor]:
        """The tokens that stay, as they are."""
        return kept_tokens(seen, plan)
