"""Keep the tokens that the class token attends to most, fuse the others (arXiv 2202.07800)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

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
from tome_export.merge.schedule import Schedule
from tome_export.reducers.base import LayerContext, LayerSpec, ModelShape
from tome_export.reducers.staged import StagedReducer


@dataclass(frozen=True)
class AttentiveReducer(StagedReducer):
    """Keeps the tokens with the most class attention, in each stage a share of them."""

    needs_class_attention = True
    fused: ClassVar[int] = 0
    """Tokens that stand for those not kept."""

    def limit(self, tokens: int, prefix: int) -> int:
        """One patch stays, beside the one that the others are fused into."""
        return max(0, tokens - prefix - 1 - self.fused)

    def counts(self, shape: ModelShape) -> Schedule:
        """``ceil(keep * (N - P))`` of the tokens stay (EViT, section 3.1), and the fused one."""
        removed, tokens = [0] * shape.depth, shape.tokens
        for layer, rate in self.stages(shape.depth).items():
            patches = tokens - shape.prefix
            wanted = patches - math.ceil(rate * patches) - self.fused
            removed[layer] = max(0, min(wanted, self.limit(tokens, shape.prefix)))
            tokens -= removed[layer]
        return Schedule(per_layer=tuple(removed))

    def signals(self, layer: LayerContext) -> tuple[Tensor, ...]:
        """Class attention ``[B, N - P]``."""
        return (layer.class_attention[:, layer.prefix :],)


@dataclass(frozen=True)
class EViT(AttentiveReducer):
    """Of N tokens behind P prefix tokens ``ceil(keep (N - P))`` stay, the others become one.

    The score a_i of token i is the mean over heads of the class token's attention to it (section
    3.1). The fused token is the sum of ``a_i x_i`` over the tokens that do not stay (section 3.2),
    not divided by the sum of a_i, as in the authors' code; it is the last token. Without counts of
    its own a layer removes r tokens: its r + 1 least attended become one. docs/reducers.md says
    what else differs.
    """

    name = "evit"
    summary = "keep the tokens with the most class attention, fuse the others into one"
    source = "EViT: Expediting Vision Transformers via Token Reorganizations, arXiv 2202.07800"
    fused = 1

    def plan(self, signals: tuple[Tensor, ...], layer: LayerSpec) -> MergePlan:
        """What stays in order of position, then the best of the rest, which takes in the others."""
        order = rank(signals[0])
        left = order.shape[1] - layer.r - 1
        patches = torch.cat([by_position(order[:, :left]), order[:, left : left + 1]], dim=1)
        keep = behind_prefix(patches, layer.prefix).int()
        src = (order[:, left + 1 :] + layer.prefix).int()
        return MergePlan(keep, src, torch.full_like(src, layer.prefix + left))

    def apply(self, layer: LayerContext, plan: MergePlan) -> tuple[Tensor, Tensor]:
        """The tokens that stay as they are, and the sum of the others weighted by attention."""
        kept, _ = layer.kept(plan)
        rest = torch.cat([plan.keep[:, -1:], plan.src], dim=1)
        weights = layer.class_attention.gather(1, rest.long())[..., None]
        # A sum and no matrix product, which GPUs may round to fewer bits.
        fused = (gather_tokens(layer.x, rest).to(accumulate_dtype(layer.x)) * weights).sum(
            dim=1, keepdim=True
        )
        x = torch.cat([kept[:, :-1], fused.to(kept.dtype)], dim=1)
        return x, merged_size(layer.size, plan)
