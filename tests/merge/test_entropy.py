"""Token-size entropy: its definition, its bounds, and its arithmetic."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tome_export.merge.entropy import (
    effective_tokens,
    entropy_bound,
    size_entropy,
    uniform_entropy,
)

SIZES = st.lists(st.integers(1, 400), min_size=1, max_size=40)


def by_definition(sizes: list[int], patches: int) -> float:
    total = sum(sizes)
    return -sum(s / total * math.log(s / total) for s in sizes) / math.log(patches)


@given(SIZES, st.integers(0, 5), st.integers(0, 300))
def test_it_is_the_definition_within_its_bound(sizes, prefix, lost):
    patches = max(2, sum(sizes) + lost)
    given = torch.tensor([[7.0] * prefix + sizes], dtype=torch.float32)
    found = size_entropy(given, prefix, patches)
    assert found.shape == (1,)
    assert found.dtype == torch.float32
    exact = by_definition(sizes, patches)
    assert abs(float(found) - exact) <= entropy_bound(len(sizes))
    assert -entropy_bound(len(sizes)) <= float(found) <= 1 + entropy_bound(len(sizes))


@pytest.mark.parametrize(
    ("sizes", "patches", "expected"),
    [
        ([1] * 16, 16, 1.0),  # nothing merged
        ([16], 16, 0.0),  # all in one
        ([4] * 4, 16, 0.5),  # evenly
        ([1] * 4, 16, 0.5),  # dropped to four: as merged evenly to four
    ],
)
def test_what_the_ends_are(sizes, patches, expected):
    size = torch.tensor([[1.0, *sizes]])
    assert float(size_entropy(size, 1, patches)) == pytest.approx(expected, abs=1e-6)


def test_rows_are_images_of_their_own():
    size = torch.tensor([[1.0, 3.0, 1.0], [1.0, 2.0, 2.0]])
    both = size_entropy(size, 1, 4)
    assert [float(size_entropy(row[None], 1, 4)) for row in size] == both.tolist()
    assert both[0] < both[1]


def test_the_figure_in_circulation_is_four_tokens():
    assert effective_tokens(0.2734, 197) == pytest.approx(4.24, abs=0.005)
    assert uniform_entropy(4, 197) < 0.2734 < uniform_entropy(5, 197)
    assert effective_tokens(uniform_entropy(7, 196), 196) == pytest.approx(7)
