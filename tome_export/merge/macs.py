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
        attention: ``N^2 * attention`` MACs are QK^T and AV together: the width of the scores plus
            that of the values, summed over heads.
        after: MACs per token behind the merge (the MLP).
    """

    before: int
    attention: int
    after: int

    def macs(self, layer: LayerTokens) -> int:
        """MACs of this block for one input, match and merge left out (under 1 %)."""
        n = layer.attended
        k = n if layer.behind_block else layer.tokens_out
        one = n * self.before + n * n * self.attention + k * self.after
        return layer.sequences * one


@dataclass(frozen=True)
class SharedCost(BlockCost):
    """Cost of a block whose sequences also attend to a few tokens that all of them share.

    Attributes:
        shared: Number of those tokens, which attend to everything.
        last: Whether nothing but them is read behind the block, so that of all others only keys
            and values are made.
    """

    shared: int = 0
    last: bool = False

    def macs(self, layer: LayerTokens) -> int:
        """See ``BlockCost.macs``."""
        everything = layer.sequences * layer.attended
        pairs = self.shared * (everything + self.shared)
        own = self.shared * (self.before + self.after) + pairs * self.attention
        if self.last:
            return own + everything * self.before // 2
        return own + super().macs(layer) + everything * self.shared * self.attention


def total_macs(costs: Sequence[BlockCost], layers: Sequence[LayerTokens], fixed: int) -> int:
    """MACs of one input in all blocks plus ``fixed`` (patch embedding and head)."""
    return fixed + sum(cost.macs(layer) for cost, layer in zip(costs, layers, strict=True))
