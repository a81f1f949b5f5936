"""The schedules there are: clamped token counts, their MACs, baselines and neighbours."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tome_export.merge.macs import BlockCost
from tome_export.merge.schedule import INFLECTION, Schedule

Rs = tuple[int, ...]
"""r of every layer, as it is after clamping."""

Table = NDArray[np.int64]
"""``[P, L]``: r of P schedules."""

Cost = Callable[[Table], NDArray[np.float64]]
"""``[P, L]`` clamped r to the cost ``[P]`` of each schedule: MACs, or milliseconds."""

STEPS = (1, 2, 4, 8)
"""Tokens that one move adds to a layer or takes from it."""


@dataclass(frozen=True)
class Space:
    """The schedules of one model.

    Attributes:
        blocks: Cost of each block.
        tokens: Tokens N that enter the first block, prefix tokens included.
        prefix: Protected tokens at the front.
        fixed: MACs outside the blocks, for a number of tokens that leave the last one.
    """

    blocks: tuple[BlockCost, ...]
    tokens: int
    prefix: int
    fixed: Callable[[int], int]

    @property
    def depth(self) -> int:
        """Number of blocks."""
        return len(self.blocks)

    def clamped(self, wanted: Table) -> Table:
        """What the model makes of r (``merge.spec.clamp_r``), of many schedules at once."""
        result = np.empty_like(wanted)
        tokens = np.full(len(wanted), self.tokens, dtype=np.int64)
        for layer in range(self.depth):
            most = np.maximum((tokens - self.prefix) // 2, 0)
            result[:, layer] = np.clip(wanted[:, layer], 0, most)
            tokens = tokens - result[:, layer]
        return result

    def tokens_in(self, r: Table) -> Table:
        """``[P, L]``: tokens that enter each layer."""
        return np.asarray(self.tokens - np.cumsum(r, axis=1) + r)

    def macs(self, r: Table) -> NDArray[np.float64]:
        """MACs per image of each schedule, exact: equal to ``merge.macs.total_macs``."""
        entering = self.tokens_in(r)
        leaving = entering - r
        before, attention, after = (
            np.array([getattr(block, name) for block in self.blocks], dtype=np.int64)
            for name in ("before", "attention", "after")
        )
        per_layer = entering * before + entering**2 * attention + leaving * after
        final, where = np.unique(leaving[:, -1], return_inverse=True)
        fixed = np.array([self.fixed(int(tokens)) for tokens in final], dtype=np.int64)
        return np.asarray(per_layer.sum(axis=1) + fixed[where], dtype=np.float64)

    def baselines(self, method: str) -> list[Rs]:
        """Every schedule of one of ToMe's families that merges something and differs.

        Args:
            method: ``constant``, ``decreasing`` or ``increasing``.
        """
        found: dict[Rs, None] = {}
        for r in range(1, self.tokens + 1):
            layers = Schedule(r, INFLECTION[method]).tokens(self.depth, self.tokens, self.prefix)
            rs = tuple(layer.r for layer in layers)
            if any(rs):
                found.setdefault(rs)
        return list(found)

    def most_merged(self) -> Rs:
        """Half of the tokens in every layer: nothing costs less."""
        everything = np.full((1, self.depth), self.tokens, dtype=np.int64)
        return rs_of(self.clamped(everything)[0])

    def neighbours(self, r: Rs) -> Table:
        """All schedules one move away: tokens more or fewer in a layer, or moved to another.

        A move may change the number of tokens on its way, because a token merged early saves more
        than one merged late.
        """
        eye = np.eye(self.depth, dtype=np.int64)
        more = np.concatenate([step * eye for step in STEPS])
        moved = (more[:, None] - more[None]).reshape(-1, self.depth)
        moves = np.concatenate([more, -more, moved])
        return np.unique(self.clamped(np.array(r, dtype=np.int64) + moves), axis=0)


def rs_of(row: NDArray[Any] | Sequence[int]) -> Rs:
    """One row of a table as plain numbers."""
    return tuple(int(value) for value in row)


def table_of(schedules: Sequence[Rs]) -> Table:
    """Schedules as ``[P, L]``."""
    return np.array(schedules, dtype=np.int64)
