"""Token counts and MACs of many schedules at once, against the model's own arithmetic."""

from __future__ import annotations

import numpy as np
import pytest

from tests.conftest import small_vit
from tome_export.merge.macs import BlockCost, total_macs
from tome_export.merge.schedule import Schedule
from tome_export.patch import patch
from tome_export.reducers import reducer_from_text
from tome_export.tune.space import SearchSpace, space_from_model, table_of

COSTS = (BlockCost(10, 2, 30), BlockCost(11, 3, 0), BlockCost(7, 1, 5))


@pytest.mark.parametrize(("tokens", "prefix"), [(17, 1), (16, 0), (20, 5), (2, 1)])
def test_is_what_the_model_counts(tokens, prefix):
    space = SearchSpace(COSTS, tokens, prefix, lambda final: 100 + 13 * final)
    rng = np.random.default_rng(0)
    wanted = rng.integers(0, tokens + 2, (200, 3))
    clamped = space.clamped(wanted)
    macs, entering = space.macs(clamped), space.tokens_in(clamped)
    for row, r, count, tokens_in in zip(wanted, clamped, macs, entering, strict=True):
        layers = Schedule(per_layer=tuple(map(int, row))).tokens(3, tokens, prefix)
        assert [layer.r for layer in layers] == list(r)
        assert [layer.tokens_in for layer in layers] == list(tokens_in)
        assert total_macs(COSTS, layers, 100 + 13 * layers[-1].tokens_out) == count


@pytest.mark.parametrize("behind_block", [False, True])
def test_other_reducers_have_other_limits(behind_block):
    """All patches but one can go, behind the block, and each decision costs something itself."""

    def limit(tokens: int, prefix: int) -> int:
        return tokens - prefix - 1

    def learned(layer):
        return 1000 * layer.tokens_in + layer.r

    space = SearchSpace(COSTS, 17, 1, lambda final: 13 * final, limit, behind_block, learned)
    wanted = np.random.default_rng(0).integers(0, 19, (200, 3))
    clamped = space.clamped(wanted)
    for row, r, count in zip(wanted, clamped, space.macs(clamped), strict=True):
        schedule = Schedule(per_layer=tuple(map(int, row)))
        layers = schedule.tokens(3, 17, 1, limit, behind_block=behind_block)
        assert [layer.r for layer in layers] == list(r)
        own = sum(learned(layer) for layer in layers if layer.r)
        assert total_macs(COSTS, layers, own + 13 * layers[-1].tokens_out) == count
    assert space.most_merged() == (15, 0, 0)
    assert space.baselines("constant")[-1] == (15, 0, 0)


def test_baselines_are_the_named_schedules(small_space):
    assert small_space.baselines("constant")[:2] == [(1, 1, 1, 1), (2, 2, 2, 2)]
    assert small_space.baselines("decreasing")[1] == (4, 2, 1, 0)
    for method in ("constant", "decreasing", "increasing"):
        found = small_space.baselines(method)
        assert len(set(found)) == len(found)
        assert all(any(r) for r in found)


def test_nothing_costs_less_than_most_merged(small_space, every_schedule):
    least = small_space.macs(table_of([small_space.most_merged()]))[0]
    assert least == small_space.macs(table_of(every_schedule)).min()


def test_moves_reach_every_schedule(small_space, every_schedule):
    seen, border = set(), [(0, 0, 0, 0)]
    while border:
        found = {tuple(map(int, row)) for r in border for row in small_space.neighbours(r)}
        border = list(found - seen)
        seen |= found
    assert seen == set(every_schedule)


@pytest.mark.parametrize(
    ("name", "options"), [("tome", ()), ("dtem", ("weights=random",)), ("topk", ())]
)
def test_macs_are_those_of_the_patched_model(name, options):
    """What a reducer's own layers take is counted too, where they have something to decide."""
    library, reducer = small_vit(depth=3), reducer_from_text(name, options)
    space = space_from_model(patch(library, 1, reducer=reducer))
    for r in ((0, 0, 0), (5, 0, 4), (8, 6, 1)):
        assert space.macs(table_of([r]))[0] == patch(library, list(r), reducer=reducer).macs()
