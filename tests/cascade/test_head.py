"""Training of the head: it learns what there is to learn, and keeps to a mean budget."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from tome_export.cascade import policy
from tome_export.cascade.calibrate import Observations, _cheapest_enough, trained_head

SHARES = [0.4, 1.0]


@pytest.fixture(scope="module")
def seen():
    """The lower member is wrong where the first pixel of the average patch is positive."""
    patches = np.random.default_rng(0).standard_normal((200, 12))
    hard = patches[:, 0] > 0.5
    right = np.stack([~hard, np.ones(200, bool)], axis=1)
    nothing = np.zeros((200, 2))
    return Observations(right, nothing, nothing, nothing[:, 0], patches)


@pytest.fixture(scope="module")
def embedding():
    rng = np.random.default_rng(1)
    return rng.standard_normal((16, 3, 2, 2)), rng.standard_normal(16)


def probabilities(seen, head):
    scores = policy.head_scores(seen.patches, head.weights, head.bias)
    powers = np.exp(scores - scores.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


def test_the_head_learns_which_images_need_more(seen, embedding):
    head = trained_head(seen, embedding, SHARES, 0.6, 0.0)
    budget = policy.by_price(
        policy.head_scores(seen.patches, head.weights, head.bias), head.shares, head.price
    )
    needed = (~seen.score[:, 0]).astype(np.int64)
    assert 0.2 < needed.mean() < 0.5
    assert (budget == needed).mean() > 0.97


@pytest.mark.parametrize("target", [0.45, 0.95])
def test_the_budget_term_moves_the_mean_to_its_target(seen, embedding, target):
    actual = {}
    for strength in (0.0, 100.0, 1e4):
        head = trained_head(seen, embedding, SHARES, target, strength)
        actual[strength] = float((probabilities(seen, head) @ SHARES).mean())
    assert abs(actual[0.0] - target) > 0.08
    assert abs(actual[100.0] - target) < 0.05
    assert abs(actual[1e4] - target) < 0.005


def test_nothing_is_drawn_at_random(seen, embedding):
    made = [trained_head(seen, embedding, SHARES, 0.6, 1.0) for _ in range(2)]
    assert made[0] == made[1]


@pytest.mark.parametrize("target", [0.5, 0.7, 0.9])
def test_without_classes_the_least_similar_images_get_more(seen, embedding, target):
    """What is similar enough follows from the target: the rest is spent where it helps most."""
    score = np.ones((200, 2))
    score[:, 0] = 1 / (1 + np.exp(seen.patches[:, 0]))
    similar = replace(seen, score=score, surprise=1 - score)
    needed = _cheapest_enough(score, SHARES, target)
    mean = np.asarray(SHARES)[needed].mean()
    assert target - 0.02 < mean <= target
    assert score[needed == 0, 0].min() >= score[needed == 1, 0].max()
    head = trained_head(similar, embedding, SHARES, target, 0.0)
    scores = policy.head_scores(seen.patches, head.weights, head.bias)
    assert (policy.by_price(scores, head.shares, head.price) == needed).mean() > 0.9


def test_of_classes_the_cheapest_that_is_right_is_enough(seen):
    expected = [next((m for m, right in enumerate(row) if right), 0) for row in seen.score]
    for target in (0.4, 1.0):
        assert _cheapest_enough(seen.score, SHARES, target).tolist() == expected
    nobody = np.zeros((3, 2), bool)
    assert _cheapest_enough(nobody, SHARES, 0.6).tolist() == [0, 0, 0]
