"""Measured schedules and their Pareto front."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from tome_export.tune.space import Rs
from tome_export.tune.surrogate import log_damage

Method = Literal["constant", "decreasing", "increasing", "free"]
BASELINES: tuple[Method, ...] = ("constant", "decreasing", "increasing")


@dataclass(frozen=True)
class Score:
    """How a schedule does on some images.

    Attributes:
        images: How many were looked at.
        correct: How many of them have the right class.
        damage: Mean Kullback-Leibler divergence, in nats, of the class probabilities from those
            of the unmerged model.
        complete: Whether every image was looked at; where the damage was beyond the bound before
            the last one, the rest were not.
        entropy: Least token-size entropy of any of them, 0 to 1.
    """

    images: int
    correct: int
    damage: float
    complete: bool = True
    entropy: float = 1.0


@dataclass(frozen=True)
class Point:
    """A measured schedule.

    Attributes:
        r: Of each layer, clamped.
        method: What proposed it first.
        cost: MACs per image, or milliseconds as predicted.
        score: On the search images.
    """

    r: Rs
    method: Method
    cost: float
    score: Score


def pareto(points: Sequence[Point]) -> list[Point]:
    """Complete points that no other beats in both cost and damage, cheapest first."""
    front: list[Point] = []
    ordered = sorted(points, key=lambda point: (point.cost, point.score.damage, point.r))
    for point in ordered:
        best = front[-1].score.damage if front else np.inf
        if point.score.complete and point.score.damage < best:
            front.append(point)
    return front


class Level:
    """The damage that the front does at a cost: what a candidate there has to beat.

    Between two points it is interpolated on the scale of both logarithms; outside them it is that
    of the nearest.
    """

    def __init__(self, front: Sequence[Point]) -> None:
        self._cost = np.log([point.cost for point in front])
        self._damage = log_damage(np.array([point.score.damage for point in front]))

    def log_damage(self, cost: NDArray[np.float64]) -> NDArray[np.float64]:
        """Log damage ``[P]`` at costs ``[P]``."""
        return np.asarray(np.interp(np.log(cost), self._cost, self._damage))
