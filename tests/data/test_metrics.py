"""Intervals against published values, and against what they promise."""

from __future__ import annotations

import numpy as np
import pytest

from tome_export.data.metrics import (
    difference_of_counts,
    paired_difference,
    share_of,
    wilson,
)

# Newcombe, Statistics in Medicine 17 (1998) 857-872, table I: method 3, the score interval.
PUBLISHED = [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611)]
PUBLISHED += [(1, 29, 0.0061, 0.1718)]


@pytest.mark.parametrize(("correct", "images", "low", "high"), PUBLISHED)
def test_wilson_gives_the_published_limits(correct, images, low, high):
    assert wilson(correct, images) == pytest.approx((low, high), abs=5e-5)


@pytest.mark.parametrize("images", [1, 7, 450, 50_000])
def test_wilson_solves_the_score_equation(images):
    for correct in {0, 1, images // 3, images - 1, images}:
        p = correct / images
        low, high = wilson(correct, images, 0.99)
        assert 0 <= low <= p <= high <= 1
        for limit in {low, high} - {0.0, 1.0}:
            z = (p - limit) / np.sqrt(limit * (1 - limit) / images)
            assert abs(z) == pytest.approx(2.5758293, rel=1e-5)


def test_share_counts():
    found = share_of(np.array([True, False, True, True]))
    assert (found.correct, found.images, found.share) == (3, 4, 0.75)
    assert (found.low, found.high) == wilson(3, 4)


def test_paired_difference_counts_the_table():
    a = np.array([1, 1, 1, 0, 0, 0], dtype=bool)
    b = np.array([1, 1, 0, 1, 0, 0], dtype=bool)
    found = paired_difference(a, b)
    assert found == difference_of_counts(2, 1, 1, 2)
    assert (found.share, found.gained, found.lost) == (0.0, 1, 1)
    assert found.low == pytest.approx(-found.high)


def test_paired_difference_changes_sign_with_its_sides():
    one, other = difference_of_counts(40, 7, 2, 11), difference_of_counts(40, 2, 7, 11)
    assert (one.share, one.low, one.high) == pytest.approx((-other.share, -other.high, -other.low))


def test_paired_difference_gains_from_pairing():
    """Models that are right on the same images differ by less than independent ones could."""
    paired = difference_of_counts(350, 5, 5, 90)
    independent = difference_of_counts(280, 75, 75, 20)  # the same shares, hardly correlated
    assert paired.high - paired.low < 0.5 * (independent.high - independent.low)


@pytest.mark.parametrize("cells", [(20, 0, 0, 0), (0, 0, 0, 20), (0, 20, 0, 0), (1, 0, 0, 0)])
def test_paired_difference_at_the_edges_stays_in_range(cells):
    found = difference_of_counts(*cells)
    assert -1 <= found.low <= found.share <= found.high <= 1
    assert found.high > found.low


def test_paired_difference_covers_what_it_promises():
    """95 of 100 intervals hold the true difference; a Wald interval of these would not."""
    rng = np.random.default_rng(0)
    shares = (0.90, 0.03, 0.01, 0.06)
    tables = rng.multinomial(150, shares, size=2000)
    found = [difference_of_counts(*map(int, table)) for table in tables]
    held = np.mean([f.low <= 0.02 <= f.high for f in found])
    assert 0.935 <= held <= 0.985
