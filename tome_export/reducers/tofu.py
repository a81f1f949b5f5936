"""Token Fusion: match as ToMe does, prune early, keep the norm late (arXiv 2312.01026)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tome_export.errors import InputError
from tome_export.merge.lowering import accumulate_dtype, merged_size, spread
from tome_export.merge.ops import merge
from tome_export.merge.plan import MergePlan
from tome_export.merge.spec import NORM_EPS
from tome_export.reducers.base import LayerContext, MatchReducer


@dataclass(frozen=True)
class ToFu(MatchReducer):
    """ToMe's matching; what becomes of a pair depends on the depth.

    In layer l of L, counted from 0, with ``l < prune L``, the token of set B stays as it is and its
    partners vanish. In later ones a group x_1 ... x_n becomes, by MLERP::

        mean(x) / |mean(x)| * max(|x_1|, ..., |x_n|)

    Sizes are counted all the same, those of pruned tokens included: average pooling and dense
    outputs use them. The re-implementation in PiToMe's repository prunes one layer more and scales
    by the norm of set B's token and not of the mean.

    Attributes:
        prune: Share of the layers, from the first, that prune.
    """

    name = "tofu"
    summary = "match as tome does; prune in early layers, merge with the norm kept in late ones"
    source = "Token Fusion: Bridging the Gap between Token Pruning and Token Merging, 2312.01026"
    prop_attn = False

    prune: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.prune <= 1:
            raise InputError(f"prune of reducer tofu is {self.prune:g}; expected 0 to 1")

    def apply(self, layer: LayerContext, plan: MergePlan) -> tuple[Tensor, Tensor]:
        """Prune or MLERP."""
        if layer.index < self.prune * layer.depth:
            return layer.kept(plan)[0], merged_size(layer.size, plan)
        mean, members = merge(layer.x, torch.ones_like(layer.size), plan)
        dtype = accumulate_dtype(layer.x)
        norm = torch.linalg.vector_norm(layer.x, dim=-1, dtype=dtype)
        moved = spread(plan.dst, norm.gather(1, plan.src.long()), plan.keep.shape[1])
        largest = torch.maximum(norm.gather(1, plan.keep.long()), moved.amax(dim=-1))
        of_mean = torch.linalg.vector_norm(mean, dim=-1, dtype=dtype).clamp_min(NORM_EPS)
        # A token alone stays what it is, to the last bit.
        scale = torch.where(members > 1, largest / of_mean, 1.0)
        x = (mean.to(dtype) * scale[..., None]).to(layer.x.dtype)
        return x, merged_size(layer.size, plan)
