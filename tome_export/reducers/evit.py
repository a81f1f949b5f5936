"""Keep the tokens that the class token attends to most, fuse the others (arXiv 2202.07800)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tome_export.merge.lowering import (
    accumulate_dtype,
    behind_prefix,
    by_position,
    gather_tokens,
    merged_size,
    rank,
)
from tome_export.merge.plan import MergePlan
from tome_export.reducers.base import LayerContext, LayerSpec, kept_tokens
from tome_export.reducers.stages import AttentiveReducer


@dataclass(frozen=True)
class EViT(AttentiveReducer):
    """Of N tokens behind P prefix tokens ``ceil(keep (N - P))`` stay, the others become one.

    The score a_i of token i is the mean over heads of the class token's attention to it (section
    3.1). The fused token is the sum of ``a_i x_i`` over the tokens that do not stay (section 3.2),
    not divided by the sum of a_i, as in the authors' code; it is the last token, and in later
    layers a token like any other. Without counts of its own a layer removes r tokens: its r + 1
    least attended become one. Tokens are removed between attention and MLP, by default at the
    quarters of the depth.

    Other than in the authors' code every prefix token is protected, not only the class token; and
    where a single token would be fused, nothing is, as that makes no token fewer. Models without a
    class token cannot use it. Proportional attention is no part of the method.
    """

    name = "evit"
    summary = "keep the tokens with the most class attention, fuse the others into one"
    source = "EViT: Expediting Vision Transformers via Token Reorganizations, arXiv 2202.07800"
    fused = 1

    def plan(self, signals: tuple[Tensor, ...], place: LayerSpec) -> MergePlan:
        """What stays in order of position, then the best of the rest, which takes in the others."""
        order = rank(signals[0])
        left = order.shape[1] - place.r - 1
        patches = torch.cat([by_position(order[:, :left]), order[:, left : left + 1]], dim=1)
        keep = behind_prefix(patches, place.prefix).int()
        src = (order[:, left + 1 :] + place.prefix).int()
        return MergePlan(keep, src, torch.full_like(src, place.prefix + left))

    def apply(self, seen: LayerContext, plan: MergePlan) -> tuple[Tensor, Tensor]:
        """The tokens that stay as they are, and the sum of the others weighted by attention."""
        kept, _ = kept_tokens(seen, plan)
        rest = torch.cat([plan.keep[:, -1:], plan.src], dim=1)
        weights = seen.class_attention.gather(1, rest.long())[..., None]
        # A sum and no matrix product, which GPUs may round to fewer bits.
        fused = (gather_tokens(seen.x, rest).to(accumulate_dtype(seen.x)) * weights).sum(
            dim=1, keepdim=True
        )
        return torch.cat([kept[:, :-1], fused.to(kept.dtype)], dim=1), merged_size(seen.size, plan)
