"""What reducers share that match tokens of one set with tokens of another, by cosine."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor

from tome_export.merge.lowering import behind_prefix, by_position, mean_keys, rank, unit_vectors
from tome_export.merge.plan import MergePlan
from tome_export.reducers.base import LayerContext, LayerSpec, ScoredReducer


def patch_directions(seen: LayerContext) -> Tensor:
    """The mean key over heads of every token behind the prefix, of length 1.

    Returns:
        ``[B, N - P, D]`` float32 (float64 for float64 keys); zero without a finite direction.
    """
    return unit_vectors(mean_keys(seen.attended.keys))[:, seen.prefix :]


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
        """Sets A and B, which together name every patch once, each in ascending order.

        Args:
            patches: Tokens behind the prefix.
            layer: Index of the block.
            r: Tokens to remove, at most the size of A.
        """

    def signals(self, seen: LayerContext) -> tuple[Tensor, ...]:
        """Cosines ``[B, |A|, |B|]``."""
        directions = patch_directions(seen)
        a, b = self._indices(directions, directions.shape[1], seen.layer, seen.r)
        return (directions[:, a] @ directions[:, b].transpose(-1, -2),)

    def plan(self, signals: tuple[Tensor, ...], place: LayerSpec) -> MergePlan:
        """Best partner of each, then the best pairs."""
        (cosines,) = signals
        a, b = self._indices(cosines, place.tokens - place.prefix, place.layer, place.r)
        best = cosines.argmax(dim=-1)
        order = rank(cosines.amax(dim=-1))
        merged = order[:, : place.r]
        stay = b.expand(cosines.shape[0], -1)
        if place.r < order.shape[1]:
            stay = torch.cat([a[order[:, place.r :]], stay], dim=1)
        return plan_by_position(stay, a[merged], b[best.gather(1, merged)], place.prefix)

    def _indices(self, beside: Tensor, patches: int, layer: int, r: int) -> tuple[Tensor, Tensor]:
        a, b = self.sets(patches, layer, r)
        return torch.tensor(a, device=beside.device), torch.tensor(b, device=beside.device)
