"""Keep the tokens that the class token attends to most, drop the others (arXiv 2202.07800)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from tome_export.merge.plan import MergePlan
from tome_export.reducers.base import LayerContext, LayerSpec
from tome_export.reducers.evit import AttentiveReducer
from tome_export.reducers.plans import ranked_plan


@dataclass(frozen=True)
class TopK(AttentiveReducer):
    """Of N tokens behind P prefix tokens ``ceil(keep (N - P))`` stay, in order of position.

    The score is that of EViT (section 3.1). Without counts of its own a layer drops its r least
    attended tokens.
    """

    name = "topk"
    summary = "drop the tokens with the least class attention"
    source = "EViT: Expediting Vision Transformers via Token Reorganizations, arXiv 2202.07800"
    drops = True

    def plan(self, signals: tuple[Tensor, ...], layer: LayerSpec) -> MergePlan:
        """Rank, cut, and put what stays in order of position."""
        return ranked_plan(signals[0], layer)

    def apply(self, layer: LayerContext, plan: MergePlan) -> tuple[Tensor, Tensor]:
        """The tokens that stay, as they are."""
        return layer.kept(plan)
