"""Outcomes against image-by-image loops, and the choice among thresholds."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest

from tome_export.artifact.cascade import LearnedPolicy
from tome_export.cascade.calibrate import (
    MOST_SETTINGS,
    Costs,
    Observations,
    best_within,
    cheapest,
    complexity_settings,
    confidence_settings,
    front_of,
    learned_settings,
    outcome,
)
from tome_export.errors import InputError

MACS = (100, 250, 600)
OWN = 7
POLICIES = ("complexity", "confidence", "learned")
COSTS = Costs(MACS, OWN)


def observations(count=80, members=3, seed=0):
    """Larger members are right more often, and surer where they are."""
    rng = np.random.default_rng(seed)
    right = rng.random((members, count)) < np.linspace(0.7, 0.97, members)[:, None]
    right[0, 0] = False
    confidence = np.clip(rng.random((members, count)) * 0.6 + 0.4 * right, 0, 1)
    confidence[0, 0] = np.nan
    surprise = np.where(right, 0.1, 2.0) + 0.1 * rng.random((members, count))
    return Observations(
        right.T, surprise.T, confidence.T, rng.random(count), rng.random((count, 4))
    )


def similarities(count=80, members=3, seed=0):
    """The same without classes: how similar members are to the last one."""
    seen = observations(count, members, seed)
    score = np.random.default_rng(seed).random((count, members)).cumsum(axis=1) / members
    score[:, -1] = 1.0
    return replace(seen, score=score, surprise=1 - score, confidence=np.full_like(score, np.nan))


def slow_outcome(settings, seen, macs):
    """One image after another: member, cost, whether it is right."""
    found = []
    for image in range(len(seen)):
        if settings.policy == "confidence":
            member, cost = 0, macs[0]
            while member < len(macs) - 1:
                sure = seen.confidence[image, member]
                if not np.isnan(sure) and sure >= settings.thresholds[member]:
                    break
                member += 1
                cost += macs[member]
        elif settings.policy == "complexity":
            member = sum(seen.complexity[image] >= t for t in settings.thresholds)
            cost = macs[member]
        else:
            net = [
                sum(w * x for w, x in zip(row, seen.patches[image], strict=True))
                + b
                - settings.price * s
                for row, b, s in zip(settings.weights, settings.bias, settings.shares, strict=True)
            ]
            member = net.index(max(net))
            cost = macs[member]
        found.append((member, cost + OWN, seen.score[image, member]))
    return found


def head_of(members=3):
    rng = np.random.default_rng(5)
    return LearnedPolicy(
        weights=rng.standard_normal((members, 4)).tolist(),
        bias=rng.standard_normal(members).tolist(),
        shares=COSTS.shares,
        price=0.0,
        patch=(2, 2),
    )


def settings_of(name, seen):
    return {
        "complexity": lambda: complexity_settings(seen),
        "confidence": lambda: confidence_settings(seen, "max"),
        "learned": lambda: list(learned_settings(seen, head_of())),
    }[name]()


@pytest.mark.parametrize("name", POLICIES)
def test_outcomes_are_those_of_the_loop(name):
    seen = observations()
    tried = settings_of(name, seen)
    for settings in tried[:: max(1, len(tried) // 25)]:
        found = outcome(settings, seen, COSTS)
        together = zip(found.budget, found.macs, found.score, strict=True)
        assert [tuple(one) for one in together] == slow_outcome(settings, seen, MACS)


@pytest.mark.parametrize("name", POLICIES)
def test_every_policy_can_do_the_least_and_the_most(name):
    seen = observations()
    found = [outcome(one, seen, Costs(MACS, 0)) for one in settings_of(name, seen)]
    costs = [one.macs for one in found]
    # Of confidence even the least lets an image go on whose answer is not finite.
    least = np.array([MACS[0]] * len(seen))
    if name == "confidence":
        least[0] += MACS[1]
    assert any((cost == least).all() for cost in costs)
    most = sum(MACS) if name == "confidence" else MACS[-1]
    assert any((cost == most).all() for cost in costs)


def test_the_number_of_settings_is_bounded():
    for members in (2, 3, 4):
        seen = observations(4000, members)
        assert 100 < len(confidence_settings(seen, "max")) <= MOST_SETTINGS
        assert 100 < len(complexity_settings(seen)) <= MOST_SETTINGS


@pytest.mark.parametrize("name", POLICIES)
def test_the_front_has_every_setting_that_no_other_beats(name):
    seen = observations(seed=2)
    tried = settings_of(name, seen)
    front = front_of(tried, seen, COSTS)
    assert [one.score.macs for one in front] == sorted({one.score.macs for one in front})
    assert [one.rank for one in front] == sorted({one.rank for one in front})
    for settings in tried:
        found = outcome(settings, seen, COSTS)
        cost, right = found.macs.mean(), found.score.sum()
        assert any(p.score.macs <= cost and p.score.correct >= right for p in front)


@pytest.mark.parametrize("name", ["complexity", "learned"])
def test_similarity_is_traded_as_accuracy_is(name):
    seen = similarities()
    tried = settings_of(name, seen)
    for settings in tried[:: max(1, len(tried) // 25)]:
        found = outcome(settings, seen, COSTS)
        expected = slow_outcome(settings, seen, MACS)
        assert [*zip(found.budget, found.macs, found.score, strict=True)] == expected
        assert (found.mean.correct, found.mean.share) == (None, np.mean([e[2] for e in expected]))
    front = front_of(tried, seen, COSTS)
    assert front[-1].score.share == 1.0
    chosen = cheapest(front, 0.9 * len(seen), "x")
    assert chosen.score.share >= 0.9
    assert all(p.score.share < 0.9 for p in front if p.score.macs < chosen.score.macs)
    within = best_within(front, 300, COSTS, "x")
    assert all(p.score.share <= within.score.share for p in front if p.score.macs <= 300)


def test_the_cheapest_that_meets_an_accuracy():
    seen = observations()
    front = front_of(confidence_settings(seen, "max"), seen, COSTS)
    needed = front[len(front) // 2].score.correct
    chosen = cheapest(front, needed, "x")
    assert chosen.score.correct >= needed
    assert all(p.score.correct < needed for p in front if p.score.macs < chosen.score.macs)
    best = front[-1].score.correct
    with pytest.raises(InputError) as caught:
        cheapest(front, best + 1, "accuracy of at least 99 %")
    assert re.fullmatch(
        rf"target is accuracy of at least 99 %, {best + 1} of the 80 calibration images right; no "
        rf"thresholds give more than {best} \(\d+\.\d\d %, at 0\.00 M MACs\), ask for no more or "
        "add an artifact that merges less",
        str(caught.value),
    )


def test_the_best_within_a_budget():
    seen = observations()
    front = front_of(confidence_settings(seen, "max"), seen, COSTS)
    chosen = best_within(front, 300, COSTS, "x")
    assert chosen.score.macs <= 300
    assert all(p.rank <= chosen.rank for p in front if p.score.macs <= 300)


@pytest.mark.parametrize("budget", [106.0, 600.0])
def test_a_budget_that_the_members_do_not_span(budget):
    seen = observations()
    millions = Costs(tuple(1_000_000 * one for one in MACS), 7_000_000)
    front = front_of(complexity_settings(seen), seen, millions)
    with pytest.raises(InputError) as caught:
        best_within(front, budget * 1e6, millions, "at most x MACs")
    assert str(caught.value) == (
        "target is at most x MACs; these artifacts span 107.00 M (the lowest for every image) to "
        "600.00 M MACs (the highest alone, without a cascade), ask for a mean in between"
    )
