"""Matrices of cases: every pair of values in ``make test``, every combination under ``slow``."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pytest


def covering(cases: Sequence[Sequence[Any]]) -> set[int]:
    """Indices of few cases in which every pair of values occurs that occurs in any.

    Greedy: of those left, the first case with the most pairs that are new.
    """
    pairs = [set(itertools.combinations(enumerate(map(_label, case)), 2)) for case in cases]
    missing = set().union(*pairs)
    chosen: set[int] = set()
    while missing:
        best = max(range(len(cases)), key=lambda index: len(pairs[index] & missing))
        chosen.add(best)
        missing -= pairs[best]
    return chosen


def pairwise(
    names: str, *axes: Iterable[Any], where: Callable[..., bool] | None = None
) -> pytest.MarkDecorator:
    """Parametrise over a product whose pairwise selection is not ``slow``.

    Args:
        names: As for ``pytest.mark.parametrize``.
        axes: Values of each name.
        where: Which combinations there are; None for all.
    """
    cases = [case for case in itertools.product(*axes) if where is None or where(*case)]
    chosen = covering(cases)
    return pytest.mark.parametrize(
        names,
        [
            pytest.param(*case, id="-".join(map(_label, case)), marks=marks)
            for index, case in enumerate(cases)
            for marks in [() if index in chosen else (pytest.mark.slow,)]
        ],
    )


def _label(value: Any) -> str:
    return str(getattr(value, "__name__", value))
