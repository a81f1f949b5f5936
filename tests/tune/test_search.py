"""The search on an objective whose every schedule can be looked at."""

from __future__ import annotations

import time
from dataclasses import replace

import numpy as np
import pytest

from tome_export.merge.macs import BlockCost
from tome_export.tune.search import BASELINES, Finalists, Score, Search, _spread, pareto
from tome_export.tune.space import SearchSpace, table_of

WEIGHTS = (0.9, 0.02, 0.3, 0.05)
IMAGES = 1000


def damage(r):
    """Layers differ in what a merged token does, and late damage depends on the earlier ones."""
    own = sum(w * (n / 8) ** 2 for w, n in zip(WEIGHTS, r, strict=True))
    return own + 0.05 * (r[0] / 8) * (r[2] / 4)


def score(r, bound=float("inf")):
    found = damage(r)
    if found > bound:
        return Score(IMAGES // 2, int(IMAGES * np.exp(-found)) // 2, found, complete=False)
    return Score(IMAGES, int(IMAGES * np.exp(-found)), found)


def searched(space, count, **options):
    search = Search(space, space.macs, score, **options)
    search.measure((0, 0, 0, 0), "constant")
    search.baselines()
    search.free(count)
    return search


@pytest.mark.parametrize("share", [0.5, 0.65, 0.8])
def test_reaches_the_least_damage_within_a_budget(small_space, every_schedule, share):
    costs = small_space.macs(table_of(every_schedule))
    budget = share * costs.max()
    allowed = [r for r, cost in zip(every_schedule, costs, strict=True) if cost <= budget]
    optimum = min(damage(r) for r in allowed)
    search = searched(small_space, 120, budget=budget)
    # A small part of the space is looked at.
    assert len(search.points) < len(every_schedule) / 3
    found = Finalists(None).best_within(search.points.values(), budget)
    assert found.score.damage == pytest.approx(optimum)
    constant = [p for p in search.points.values() if p.method == "constant" and p.cost <= budget]
    assert found.score.damage < min(p.score.damage for p in constant)


@pytest.mark.parametrize("needed", [990, 950, 900, 700])
def test_reaches_the_least_cost_at_an_accuracy(small_space, every_schedule, needed):
    costs = small_space.macs(table_of(every_schedule))
    optimum = min(
        cost
        for r, cost in zip(every_schedule, costs, strict=True)
        if score(r).total >= needed and any(r)
    )
    search = searched(small_space, 120, needed=needed)
    points = [point for point in search.points.values() if any(point.r)]
    found = Finalists(None).cheapest(points, needed, 0)
    assert found.cost <= 1.005 * optimum
    constant = [p.cost for p in points if p.method == "constant" and p.score.total >= needed]
    assert found.cost <= min(constant, default=float("inf"))


def test_is_the_same_for_a_seed_and_not_for_another(small_space):
    runs = [list(searched(small_space, 40, needed=950, seed=s).points) for s in (3, 3, 4)]
    assert runs[0] == runs[1]
    assert runs[0] != runs[2]


def test_ends_at_the_deadline(small_space):
    search = Search(small_space, small_space.macs, score, needed=900, deadline=0.0)
    search.measure((0, 0, 0, 0), "constant")
    search.baselines()
    search.free(10)
    assert list(search.points) == [(0, 0, 0, 0)]
    assert search.cut_short


@pytest.mark.parametrize("share", [0.55, 0.9])
def test_what_a_budget_is_compared_with_comes_first(share):
    """The best constant r, however few there is time for and however many there are."""
    space = SearchSpace((BlockCost(100, 3, 200),) * 4, 401, 1, lambda _: 1000)
    constant = space.baselines("constant")
    costs = space.macs(table_of(constant))
    budget = share * float(space.macs(table_of([(0, 0, 0, 0)]))[0])
    expected = max((cost, r) for cost, r in zip(costs, constant, strict=True) if cost <= budget)[1]
    assert expected not in _spread(constant, BASELINES["constant"])
    looked = []

    def evaluate(r, bound):
        looked.append(r)
        search.deadline = 0.0
        return score(r, bound)

    search = Search(space, space.macs, evaluate, budget=budget)
    search.baselines()
    assert looked == [expected]


def test_the_best_constant_r_is_among_what_is_measured():
    """However wide the family is spread."""
    space = SearchSpace((BlockCost(100, 3, 200),) * 4, 401, 1, lambda _: 1000)
    constant = space.baselines("constant")
    expected = constant[len(BASELINES) + 40]
    assert expected not in _spread(constant, BASELINES["constant"])

    def evaluate(r, _):
        return Score(IMAGES, IMAGES - 2 * sum(r), sum(r) / IMAGES)

    search = Search(space, space.macs, evaluate, needed=IMAGES - 2 * sum(expected))
    search.measure((0, 0, 0, 0), "constant")
    search.baselines()
    good = [p for p in search.points.values() if any(p.r) and p.method == "constant"]
    assert Finalists(None).cheapest(good, search.needed, 0).r == expected


def test_free_lists_have_a_share_of_the_time(small_space):
    """Baselines that half of the time leaves out are measured once there is time again."""
    late = time.monotonic() + 600
    search = Search(small_space, small_space.macs, score, needed=900, deadline=late)
    search.measure((0, 0, 0, 0), "constant")
    search.baselines(share=-1.0)
    assert len(search.points) == 1
    assert not search.cut_short
    search.baselines()
    assert len(search.points) > 20


def test_bad_candidates_are_left_early_and_never_chosen(small_space):
    search = searched(small_space, 150, needed=950)
    left = [point for point in search.points.values() if not point.score.complete]
    assert left
    assert not set(left) & set(pareto(list(search.points.values())))
    found = Finalists(None).cheapest(search.points.values(), 950, 0)
    assert found.score.complete


def test_the_target_holds_on_all_images_not_on_those_of_the_search(small_space):
    """Validation refuses what only looked good, and is asked as seldom as can be."""
    search = searched(small_space, 120, needed=950)
    looked = []

    def validate(r):
        looked.append(r)
        return Score(IMAGES, score(r).total - (30 if r[1] > 4 else 0), damage(r))

    points = [point for point in search.points.values() if any(point.r)]
    found = Finalists(validate).cheapest(points, 1900, IMAGES)
    assert found.score.total >= 1900
    assert found.score.images == 2 * IMAGES
    assert len(looked) == len(set(looked)) < len(points) / 2
    plain = Finalists(None).cheapest(points, 950, 0)
    assert found.cost > plain.cost


def test_finds_the_whole_front(small_space, every_schedule):
    """At every cost, what was found is within a hundredth nat of the best there is at that cost."""
    costs = small_space.macs(table_of(every_schedule))
    search = searched(small_space, 400, budget=costs.max())
    assert len(search.points) < len(every_schedule) / 2
    found = pareto(list(search.points.values()))
    order = np.argsort(costs, kind="stable")
    best = np.minimum.accumulate([damage(every_schedule[i]) for i in order])
    for cost, optimum in zip(costs[order], best, strict=True):
        reached = min(point.score.damage for point in found if point.cost <= cost)
        assert reached <= optimum + 0.01


def test_the_choice_ends_with_its_time(small_space):
    """No matter that nothing has met the target: one more is looked at, the likeliest to."""
    search = searched(small_space, 60, needed=950)
    points = [point for point in search.points.values() if any(point.r)]
    best = max(points, key=lambda p: (p.score.total, -p.score.damage))

    for right, met in ((IMAGES, True), (0, False)):
        looked = []

        def validate(r, right=right, looked=looked):
            looked.append(r)
            return Score(IMAGES, right, damage(r))

        found = Finalists(validate, lambda: True).cheapest(points, 1900, IMAGES)
        assert looked == [best.r]
        assert (found is not None) == met


def test_what_merges_too_much_neither_wins_nor_leads_on(small_space):
    """The entropy falls with what the first layer merges; what is under the least is out."""

    def evaluate(r, bound=float("inf")):
        found = score(r, bound)
        return replace(found, entropy=1.0 - r[0] / 10)

    search = Search(small_space, small_space.macs, evaluate, needed=0, min_entropy=0.75)
    search.measure((0, 0, 0, 0), "constant")
    search.measure(small_space.most_merged(), "constant")
    search.baselines()
    search.free(60)
    considered = search.considered()
    assert {point.r for point in considered} == {r for r in search.points if r[0] <= 2}
    assert 0 < len(considered) < len(search.points)
    # Free lists are moves from what is considered: at most one step beyond it.
    free = [point for point in search.points.values() if point.method == "free"]
    assert free
    assert sum(point.r[0] <= 2 for point in free) > len(free) / 2
