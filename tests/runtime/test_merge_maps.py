"""Composed plans, against the composition in torch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from layers import layers_of

from tome_export.merge import plan as torch_plan
from tome_export.merge.ops import match
from tome_export.runtime.merge_maps import Plans, groups_by_layer, layers_from_positions, token_map
from tome_export.spec import PatchGrid


def random_plans(schedule, tokens, prefix, batch, seed):
    """Plans of random metrics, by layer, for torch and for numpy."""
    generator = torch.Generator().manual_seed(seed)
    plans = []
    for r in schedule:
        plans.append(None)
        if r:
            metric = torch.randn(batch, tokens, 8, generator=generator)
            plans[-1] = match(metric, r, prefix, prefix > 0)
            tokens -= r
    ours = {i: Plans(*(part.numpy() for part in p)) for i, p in enumerate(plans) if p is not None}
    return plans, ours


@pytest.mark.parametrize(
    ("schedule", "tokens", "prefix", "batch"),
    [
        ((7, 0, 5, 4), 33, 1, 2),
        ((8, 8, 8), 40, 0, 3),
        ((0, 0, 3), 26, 2, 1),
        ((5, 5), 29, 5, 2),
        ((0, 0), 17, 1, 2),
    ],
)
def test_groups_are_those_of_the_source_map(schedule, tokens, prefix, batch):
    for seed in range(3):
        plans, ours = random_plans(schedule, tokens, prefix, batch, seed)
        layers = layers_of([tokens - sum(schedule[:i]) for i in range(len(schedule) + 1)])
        found = groups_by_layer(ours, layers, batch)
        assert found.shape == (batch, len(schedule), 1, tokens)
        for layer in range(len(schedule)):
            expected = torch_plan.source_map(plans[: layer + 1], batch, tokens)
            np.testing.assert_array_equal(found[:, layer, 0], expected.numpy())


def test_token_map_is_that_of_torch():
    plans, ours = random_plans((6,), 20, 1, 4, 0)
    np.testing.assert_array_equal(token_map(ours[0]), torch_plan.token_map(plans[0]).numpy())


def test_layers_say_what_is_merged():
    # A class token and six patches; the last is (wrongly) merged into the class token.
    positions = np.array([[0, 1, 2, 3, 4, 5, 6], [0, 1, 1, 1, 2, 2, 0]])
    first, second = layers_from_positions(positions[:, None], (7, 3), 1, PatchGrid(2, 3, 4, 4))
    assert (first.merged, first.largest, first.patches_in_prefix) == ({}, 1, 0)
    assert (second.merged, second.largest, second.patches_in_prefix) == ({1: 3, 2: 2}, 3, 1)
    assert second.ids.tolist() == [[1, 1, 1], [2, 2, 0]]
    assert (second.layer, second.tokens) == (1, 3)
