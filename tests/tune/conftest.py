"""A small space of schedules that can be walked through whole."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from tome_export.merge.macs import BlockCost
from tome_export.tune.space import SearchSpace, rs_of


@pytest.fixture
def small_space() -> SearchSpace:
    return SearchSpace((BlockCost(100, 3, 200),) * 4, 17, 1, lambda tokens: 1000 + 7 * tokens)


@pytest.fixture
def every_schedule(small_space):
    """All of the small space, by an independent walk."""
    wanted = np.array(list(itertools.product(range(9), repeat=4)))
    return sorted({rs_of(row) for row in small_space.clamped(wanted)})
