"""Targets: how they are written, and what meets them."""

from __future__ import annotations

import pytest

from tome_export.artifact.goal import Goal
from tome_export.errors import InputError


@pytest.mark.parametrize(
    ("text", "images", "unmerged", "needed"),
    [
        ("-0.5", 450, 450, 448),  # 2 of 450 are 0.44 points, 3 are 0.67
        ("-0.5", 225, 225, 224),
        ("-0", 24, 20, 20),
        ("-1", 200, 150, 148),
        ("-100", 10, 10, 0),
        ("97.2", 1000, 990, 972),
        ("97.25", 1000, 10, 973),
        ("100", 7, 7, 7),
    ],
)
def test_images_that_must_be_right(text, images, unmerged, needed):
    goal = Goal.min_accuracy(text)
    assert goal.needed(images, unmerged) == needed
    assert goal.budget(1e9) is None


def test_a_mean_similarity():
    goal = Goal.min_similarity(0.98)
    assert goal.needed(200, 200) == pytest.approx(196)
    assert goal.needed(200, 200) < 196
    assert goal.budget(1e9) is None
    for value in (0.0, -0.5, 1.5, float("nan")):
        with pytest.raises(InputError, match=r"is .*; expected a mean above 0, at most 1, such as"):
            Goal.min_similarity(value)


@pytest.mark.parametrize(
    ("text", "budget"),
    [("50%", 5e8), ("12.5 %", 1.25e8), ("8.7G", 8.7e9), ("9m", 9e6), ("3K", 3e3), ("1e6", 1e6)],
)
def test_macs_that_are_allowed(text, budget):
    goal = Goal.target_macs(text)
    assert goal.budget(1e9) == pytest.approx(budget, rel=1e-12)
    assert goal.needed(10, 10) is None


@pytest.mark.parametrize("text", ["0", "0.5", "101", "half", "-101", "nan", "", "-inf", "5%"])
def test_what_is_no_accuracy(text):
    with pytest.raises(InputError) as error:
        Goal.min_accuracy(text)
    assert str(error.value) == (
        f"minimum accuracy is {text!r}; expected the drop that is allowed, in points, such as "
        "-0.5, or an accuracy from 1 to 100 percent such as 97.2"
    )


@pytest.mark.parametrize("text", ["0", "-5", "0%", "101%", "ten", "", "5T", "1.2.3"])
def test_what_is_no_number_of_macs(text):
    with pytest.raises(InputError) as error:
        Goal.target_macs(text)
    assert str(error.value) == (
        f"target MACs is {text!r}; expected a share of the unmerged model such as 50%, or MACs per "
        "image such as 8.7G or 9.5M"
    )


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_what_is_no_latency(value):
    with pytest.raises(InputError, match=r"target latency is .* ms; expected more than 0"):
        Goal.target_latency(value)
