"""The schedules there are: clamped token counts, their MACs, baselines and neighbours."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tome_export.merge.macs import BlockCost
from tome_export.merge.schedule import INFLECTION, Schedule
from tome_export.merge.spec import clamp_r

Rs = tuple[int, ...]
"""r of every layer, as it is after clamping."""

Table = NDArray[np.int64]
"""``[P, L]``: r of P schedules."""

Cost = Callable[[Table], NDArray[np.float64]]
"""``[P, L]`` clamped r to the cost ``[P]`` of each schedule: MACs, or milliseconds."""

STEPS = (1, 2, 4, 8)
"""Tokens that one move adds to a layer or takes from it."""


def half(tokens: int, prefix: int) -> int:
    """The most tokens that bipartite matching can merge in one layer."""
    return clamp_r(tokens, tokens, prefix)


@dataclass(frozen=True)
class Space:
    """The schedules of one model.

    Attributes:
        blocks: Cost of each block.
        tokens: Tokens N that enter the first block, prefix tokens included.
        prefix: Protected tokens at the front.
        fixed: MACs outside the blocks, for a number of tokens that leave the last one.
        limit: The most tokens that a layer can remove, of its tokens and prefix.
        behind_block: Whether tokens are removed behind a block's MLP, and not in front of it.
        learned: MACs of what decides in one layer, of its tokens and r above 0; None for none.
    """

    blocks: tuple[BlockCost, ...]
    tokens: int
    prefix: int
    fixed: Callable[[int], int]
    limit: Callable[[int, int], int] = half
    behind_block: bool = False
    learned: Callable[[int, int], int] | None = None

    @property
    def depth(self) -> int:
        """Number of blocks."""
        return len(self.blocks)

    def clamped(self, wanted: Table) -> Table:
        """What the model makes of r, of many schedules at once."""
        result = np.empty_like(wanted)
        tokens = np.full(len(wanted), self.tokens, dtype=np.int64)
        for layer in range(self.depth):
            counts, where = np.unique(tokens, return_inverse=True)
            most = np.array([self.limit(int(count), self.prefix) for count in counts], np.int64)
            result[:, layer] = np.clip(wanted[:, layer], 0, most[where])
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
        behind = entering if self.behind_block else leaving
        per_layer = entering * before + entering**2 * attention + behind * after
        if self.learned is not None:
            pairs, at = np.unique(
                np.stack([entering, r], axis=-1).reshape(-1, 2), axis=0, return_inverse=True
            )
            own = [self.learned(int(n), int(k)) if k else 0 for n, k in pairs]
            per_layer = per_layer + np.array(own, np.int64)[at].reshape(r.shape)
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
            wanted = Schedule(r, INFLECTION[method]).resolve(self.depth)
            rs = rs_of(self.clamped(table_of([wanted]))[0])
            if any(rs):
                found.setdefault(rs)
        return list(found)

    def most_merged(self) -> Rs:
        """As many tokens as there can be in every layer: nothing costs less."""
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
