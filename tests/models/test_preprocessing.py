from __future__ import annotations

import math

import pytest

from tome_export.models.preprocessing import are_numbers, is_number


@pytest.mark.parametrize("value", [0, -1, 0.5, 10**300])
def test_finite_numbers_are_numbers(value):
    assert is_number(value)
    assert are_numbers((value, 1.0), 2)
    assert not are_numbers((value,), 2)


@pytest.mark.parametrize("value", [True, None, "1", math.nan, math.inf, 10**400, [1]])
def test_other_values_are_none(value):
    assert not is_number(value)
    assert not are_numbers([value], 1)
