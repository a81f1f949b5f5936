"""Plans that several reducers make: by rank of scores, and by similarity of two sets of patches."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor

from tome_export.merge.lowering import (
    accumulate_dtype,
    behind_prefix,
    by_position,
    mean_keys,
    rank,
    unit_vectors,
)
from tome_export.merge.plan import MergePlan
from tome_export.reducers.base import LayerContext, LayerSpec, ScoredReducer


def cosines(x: Tensor) -> Tensor:
    """Cosine of every pair of tokens, ``[B, n, D] -> [B, n, n]`` float32 (float64 for float64)."""
    unit = unit_vectors(x.to(accumulate_dtype(x)))
    return unit @ unit.transpose(1, 2)


def patch_directions(layer: LayerContext) -> Tensor:
    """The mean key over heads of every token behind the prefix, of length 1.

    Returns:
        ``[B, N - P, D]`` float32 (float64 for float64 keys); zero without a finite direction.
    """
    return unit_vectors(mean_keys(layer.attention.keys))[:, layer.prefix :]


def ranked_plan(
    scores: Tensor, layer: LayerSpec, similarity: Tensor | None = None, merging: int = 0
) -> MergePlan:
    """The r lowest of scores ``[B, n]`` behind the prefix go; the rest is in order of position.

    ``merging`` of the r tokens, the best, go into the most similar token that stays, by
    ``similarity`` ``[B, n, n]``; the others are dropped.
    """
    order = rank(scores)
    tokens = order.shape[1]
    kept = tokens - layer.r
    stay = by_position(order[:, :kept])
    keep = behind_prefix(stay, layer.prefix).int()
    src = (order[:, kept:] + layer.prefix).int()
    if similarity is None or merging == 0:
        return MergePlan(keep, src, torch.full_like(src, -1))
    rows = order[:, kept : kept + merging]
    to_all = similarity.gather(1, rows[..., None].expand(-1, -1, tokens))
    best = to_all.gather(2, stay[:, None].expand(-1, merging, -1)).argmax(dim=-1)
    dst = (best + layer.prefix).int()
    if merging < layer.r:
        dst = torch.cat([dst, torch.full_like(src[:, merging:], -1)], dim=1)
    return MergePlan(keep, src, dst)


def plan_by_position(stay: Tensor, src: Tensor, into: Tensor, prefix: int) -> MergePlan:
    """A plan whose output is in order of position. Patches are counted behind the prefix.

    Args:
        stay: ``[B, K - P]`` int64, patches that stay, in any order.
        src: ``[B, R]`` int64, patches that go, best match first.
        into: ``[B, R]`` int64, the patch that each of them goes into; one that stays.
        prefix: Protected tokens P at the front.
    """
    keep = behind_prefix(by_position(stay), prefix)
    # In ascending order a token's position is the number of those below it.
    dst = (keep[:, None, :] < into[..., None] + prefix).sum(dim=-1)
    return MergePlan(keep.int(), (src + prefix).int(), dst.int())


class FixedSets(ScoredReducer):
    """Patches of set A merge into patches of set B; who is in which is fixed beforehand.

    Every patch of A is matched with its most similar one of B, by the cosine of the mean keys; the
    r best pairs merge.
    """

    @abstractmethod
    def sets(self, patches: int, layer: int, r: int) -> tuple[list[int], list[int]]:
        """Sets A (at least r) and B, which together name every patch once, each ascending."""

    def signals(self, layer: LayerContext) -> tuple[Tensor, ...]:
        """Similarities ``[B, |A|, |B|]``."""
        directions = patch_directions(layer)
        a, b = self._indices(layer, directions)
        return (directions[:, a] @ directions[:, b].transpose(-1, -2),)

    def plan(self, signals: tuple[Tensor, ...], layer: LayerSpec) -> MergePlan:
        """Best partner of each, then the best pairs."""
        (similarity,) = signals
        a, b = self._indices(layer, similarity)
        best = similarity.argmax(dim=-1)
        order = rank(similarity.amax(dim=-1))
        merged = order[:, : layer.r]
        stay = b.expand(similarity.shape[0], -1)
        if layer.r < order.shape[1]:
            stay = torch.cat([a[order[:, layer.r :]], stay], dim=1)
        return plan_by_position(stay, a[merged], b[best.gather(1, merged)], layer.prefix)

    def _indices(self, layer: LayerSpec, like: Tensor) -> tuple[Tensor, Tensor]:
        a, b = self.sets(layer.tokens - layer.prefix, layer.index, layer.r)
        return torch.tensor(a, device=like.device), torch.tensor(b, device=like.device)
