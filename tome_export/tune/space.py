"""The schedules of a model: clamped token counts, their MACs, baselines and neighbours."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from tome_export.merge.macs import BlockCost
from tome_export.merge.schedule import INFLECTION, LayerTokens, Schedule
from tome_export.merge.spec import clamp_r

if TYPE_CHECKING:
    from tome_export.patch import MergedModel

Rs = tuple[int, ...]
"""r of every layer, as it is after clamping."""

ScheduleTable = NDArray[np.int64]
"""``[P, L]``: r of P schedules."""

Cost = Callable[[ScheduleTable], NDArray[np.float64]]
"""``[P, L]`` clamped r to the cost ``[P]`` of each schedule: MACs, or milliseconds."""

STEPS = (1, 2, 4, 8)
"""Tokens that one move adds to a layer or takes from it."""


@dataclass(frozen=True)
class SearchSpace:
    """The schedules of one model.

    Attributes:
        tokens: Tokens N that enter the first block, prefix tokens included.
        fixed: MACs outside the blocks, for a number of tokens that leave the last one.
        limit: The most tokens that a layer can remove, of its tokens and prefix.
        behind_block: Whether tokens are removed behind a block's MLP, and not in front of it.
        learned: MACs of what decides in one layer with r above 0; None for none.
    """

    blocks: tuple[BlockCost, ...]
    tokens: int
    prefix: int
    fixed: Callable[[int], int]
    limit: Callable[[int, int], int] = lambda tokens, prefix: clamp_r(tokens, tokens, prefix)
    behind_block: bool = False
    learned: Callable[[LayerTokens], int] | None = None

    @property
    def depth(self) -> int:
        """Number of blocks."""
        return len(self.blocks)

    def clamped(self, wanted: ScheduleTable) -> ScheduleTable:
        """What the model makes of r, of many schedules at once."""
        result = np.empty_like(wanted)
        tokens = np.full(len(wanted), self.tokens, dtype=np.int64)
        for layer in range(self.depth):
            most = _of_each(lambda count: self.limit(count, self.prefix), tokens)
            result[:, layer] = np.clip(wanted[:, layer], 0, most)
            tokens = tokens - result[:, layer]
        return result

    def tokens_in(self, r: ScheduleTable) -> ScheduleTable:
        """``[P, L]``: tokens that enter each layer."""
        return np.asarray(self.tokens - np.cumsum(r, axis=1) + r)

    def macs(self, r: ScheduleTable) -> NDArray[np.float64]:
        """MACs per image of each schedule, exact: equal to ``merge.macs.total_macs``."""
        entering = self.tokens_in(r)
        total = _of_each(self.fixed, (entering - r)[:, -1])
        for block, tokens, removed in zip(self.blocks, entering.T, r.T, strict=True):
            # The arithmetic of one layer, on the column of all schedules.
            layer: Any = LayerTokens(*(tokens, removed, tokens - removed), self.behind_block)
            total += block.macs(layer)
            if self.learned is not None:
                total += np.where(removed > 0, self.learned(layer), 0)
        return total.astype(np.float64)

    def baselines(self, method: str) -> list[Rs]:
        """Every schedule of ``constant``, ``decreasing`` or ``increasing`` r that differs."""
        counts = range(1, self.tokens + 1)
        wanted = [Schedule(r, INFLECTION[method]).resolve(self.depth) for r in counts]
        return list(dict.fromkeys(rs_of(row) for row in self.clamped(table_of(wanted)) if any(row)))

    def most_merged(self) -> Rs:
        """As many tokens as there can be in every layer: nothing takes fewer MACs."""
        return rs_of(self.clamped(table_of([(self.tokens,) * self.depth]))[0])

    def neighbours(self, r: Rs) -> ScheduleTable:
        """All schedules one move away: tokens more or fewer in a layer, or moved to another.

        A move may change the number of tokens on its way, because a token merged early saves more
        than one merged late.
        """
        eye = np.eye(self.depth, dtype=np.int64)
        more = np.concatenate([step * eye for step in STEPS])
        moved = (more[:, None] - more[None]).reshape(-1, self.depth)
        moves = np.concatenate([more, -more, moved])
        return np.unique(self.clamped(np.array(r, dtype=np.int64) + moves), axis=0)


def space_from_model(model: MergedModel) -> SearchSpace:
    """The schedules of a model, with MACs counted as the artifact's manifest counts them."""
    tower, reducer = model.tower, model.settings.reducer
    return SearchSpace(
        model.block_costs,
        tower.tokens,
        tower.prefix,
        functools.cache(model.fixed_macs),
        reducer.limit,
        reducer.behind_block,
        None if model.reducer is None else lambda layer: reducer.macs(layer, tower),
    )


def _of_each(count_of: Callable[[int], int], tokens: ScheduleTable) -> ScheduleTable:
    """A count for each number of tokens ``[P]``; equal numbers are looked up once."""
    numbers, where = np.unique(tokens, return_inverse=True)
    return np.array([count_of(int(number)) for number in numbers], np.int64)[where]


def rs_of(row: NDArray[Any] | Sequence[int]) -> Rs:
    """One row of a table as plain numbers."""
    return tuple(int(value) for value in row)


def table_of(schedules: Sequence[Rs]) -> ScheduleTable:
    """Schedules as ``[P, L]``."""
    return np.array(schedules, dtype=np.int64)
