"""The cost table gives back what it was made from."""

from __future__ import annotations

import numpy as np
import pytest

from tome_export.merge.macs import BlockCost
from tome_export.tune.latency import Measurement, fit, predicted_ms
from tome_export.tune.space import SearchSpace, table_of

KNOWN = {"attention": (0.5, 0.02, 3e-4), "mlp": (0.2, 0.07), "match": (0.1, 0.0, 1e-4)}


@pytest.fixture
def space() -> SearchSpace:
    return SearchSpace((BlockCost(1, 1, 1),) * 6, 197, 1, lambda _: 0)


def layer_ms(group, entering, leaving):
    tokens = leaving if group == "mlp" else entering
    return sum(c * tokens**power for power, c in enumerate(KNOWN[group]))


def measured(space, r, *, factor=1.25, noise=None):
    layers, total, tokens = [], 2.0, space.tokens
    for merged in r:
        groups = {
            group: layer_ms(group, tokens, tokens - merged) * (1 + (noise() if noise else 0))
            for group in KNOWN
            if merged or group != "match"
        }
        total += sum(groups.values())
        layers.append(groups)
        tokens -= merged
    return Measurement(r, tuple(layers), 2.0, factor * total)


SCHEDULES = [(0,) * 6, (5,) * 6, (16,) * 6, (30, 20, 10, 5, 2, 1)]


def test_recovers_known_coefficients(space):
    costs = fit(space, [measured(space, r) for r in SCHEDULES], 1, "fp32")
    (layers,) = costs.layers
    for cost in layers.groups:
        known = pytest.approx(KNOWN[cost.group], rel=1e-6, abs=1e-9)
        assert cost.coefficients == known, cost.group
    assert costs.run_over_nodes == pytest.approx(1.25)
    assert costs.residual < 1e-9
    assert costs.outside_ms == 2.0
    other = (40, 0, 30, 0, 9, 0)
    found = predicted_ms(space, costs, table_of([other]))[0]
    assert found == pytest.approx(measured(space, other).run_ms)


def test_noise_is_told_and_stays_small(space):
    rng = np.random.default_rng(1)
    noisy = [measured(space, r, noise=lambda: rng.normal(0, 0.05)) for r in SCHEDULES]
    costs = fit(space, noisy, 1, "fp32")
    assert 0.0 < costs.residual < 0.05
    other = (40, 0, 30, 0, 9, 0)
    found = predicted_ms(space, costs, table_of([other]))[0]
    assert found == pytest.approx(measured(space, other).run_ms, rel=0.05)


def test_layers_of_one_arithmetic_are_written_once(space):
    costs = fit(space, [measured(space, r) for r in SCHEDULES], 2, "fp16")
    assert (costs.batch, costs.precision, costs.measurements) == (2, "fp16", len(SCHEDULES))
    (layer,) = costs.layers
    assert layer.layers == tuple(range(6))
    groups = {one.group: one for one in layer.groups}
    assert set(groups) == set(KNOWN)
    assert (groups["mlp"].of, groups["attention"].of) == ("tokens_out", "tokens_in")


def test_what_falls_with_more_tokens_is_taken_for_constant(space):
    """No coefficient is below zero, where the unconstrained fit has one."""
    rows = []
    for r in SCHEDULES:
        rows.append(measured(space, r))
        tokens = space.tokens
        for groups, merged in zip(rows[-1].layers, r, strict=True):
            groups["mlp"] = 20.0 - 0.05 * (tokens - merged)
            tokens -= merged
    (layers,) = fit(space, rows, 1, "fp32").layers
    for cost in layers.groups:
        assert min(cost.coefficients) >= 0, cost.group
        if cost.group == "mlp":
            assert cost.coefficients[1] == 0 < cost.coefficients[0]
