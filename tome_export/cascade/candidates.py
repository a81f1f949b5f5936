"""The thresholds worth a try: those between which images of the calibration change sides."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from tome_export.cascade import policy
from tome_export.cascade.outcome import Observations, Settings

MOST = 3000
"""Most settings that are tried, of all thresholds together."""

MOST_PRICES = 250
"""Most prices that are tried of one head."""

NEVER, ALWAYS = 0.0, 2.0
"""Thresholds of a confidence that no image, or every one, is under: it lies between 0 and 1."""


def complexity_settings(seen: Observations) -> list[Settings]:
    """Ascending thresholds on the score, one fewer than there are members."""
    count = len(seen.classes) - 1
    low, high = float(seen.complexity.min()) - 1.0, float(seen.complexity.max()) + 1.0
    cuts = [low, *_cuts(seen.complexity, _levels(count)), high]
    found = itertools.combinations_with_replacement(sorted(set(cuts)), count)
    return [{"policy": "complexity", "thresholds": list(one)} for one in found]


def confidence_settings(seen: Observations, measure: str) -> list[Settings]:
    """One threshold for each member but the last, each on its own.

    They lie denser among the images that a member is least sure of, where thresholds of use are.
    """
    count = len(seen.classes) - 1
    each = [
        sorted({NEVER, *_cuts(known, _levels(count), power=2), ALWAYS})
        for known in seen.confidence[:-1]
    ]
    return [
        {"policy": "confidence", "measure": measure, "thresholds": list(one)}
        for one in itertools.product(*each)
    ]


def learned_settings(
    seen: Observations, head: tuple[list[list[float]], list[float]], shares: Sequence[float]
) -> Iterator[dict[str, object]]:
    """Prices at which images of the calibration change from one member to another.

    Args:
        seen: With average patches.
        head: Weights ``[M][P]`` and bias ``[M]``, see ``policy.head_scores``.
        shares: MACs of each member over the largest's.
    """
    weights, bias = head
    if seen.patches is None:
        raise ValueError("average patches were not observed")
    scores = policy.head_scores(seen.patches, weights, bias)
    turns = np.concatenate(
        [
            (scores[:, j] - scores[:, i]) / (shares[j] - shares[i])
            for i, j in itertools.combinations(range(len(shares)), 2)
        ]
    )
    spread = float(np.abs(turns).max()) + 1.0
    for price in [-spread, *_cuts(turns, MOST_PRICES), spread]:
        yield {
            "policy": "learned",
            "weights": weights,
            "bias": bias,
            "shares": list(shares),
            "price": price,
        }


def _levels(thresholds: int) -> int:
    """Levels of each of so many thresholds, for ``MOST`` settings in all."""
    return max(2, int(MOST ** (1 / thresholds)) - 2)


def _cuts(values: NDArray[np.float64], most: int, power: float = 1) -> list[float]:
    """Midpoints between neighbouring values, at most so many, evenly by rank where power is 1."""
    known = np.unique(values[np.isfinite(values)])
    middles = (known[1:] + known[:-1]) / 2
    if len(middles) <= most:
        return [float(value) for value in middles]
    ranks = np.unique(np.rint((len(middles) - 1) * np.linspace(0, 1, most) ** power).astype(int))
    return [float(middles[rank]) for rank in ranks]
