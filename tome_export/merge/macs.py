"""Multiply-accumulates of a merged transformer, from its token counts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tome_export.merge.schedule import LayerTokens


@dataclass(frozen=True)
class BlockCost:
    """What one block costs per token, for counting MACs.

    Attributes:
        before: MACs per token ahead of the merge (projections of the attention).
        attention: Width of the attention scores plus that of the values, summed over heads:
            ``N^2 * attention`` MACs for QK^T and AV together.
        after: MACs per token behind the merge (the MLP).
    """

    before: int
    attention: int
    after: int

    def macs(self, layer: LayerTokens) -> int:
        """MACs of this block for one image, match and merge left out (under 1 %)."""
        n = layer.tokens_in
        k = n if layer.behind_block else layer.tokens_out
        return n * self.before + n * n * self.attention + k * self.after


def total_macs(costs: Sequence[BlockCost], layers: Sequence[LayerTokens], fixed: int) -> int:
    """MACs per image of all blocks plus ``fixed`` (patch embedding and head)."""
    return fixed + sum(cost.macs(layer) for cost, layer in zip(costs, layers, strict=True))
