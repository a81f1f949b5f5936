"""A guess of the damage that a schedule does, from those that were measured."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from tome_export.tune.space import Table

_SMALLEST = 1e-6
"""Damage in nats below which differences mean nothing; keeps the logarithm finite."""

_RIDGE = 0.05


def log_damage(damage: NDArray[np.float64]) -> NDArray[np.float64]:
    """The scale on which damage is modelled and compared."""
    return np.asarray(np.log(damage + _SMALLEST))


class Surrogate:
    """Ridge regression of the log damage on r and r squared of each layer.

    It only ranks candidates: what it ranks first is measured, and only measurements count.

    Args:
        r: ``[P, L]``: measured schedules.
        damage: ``[P]``: their damage, in nats.
        weight: ``[P]``: how much each counts, above 0.
        tokens: Tokens of the model, to which r is related.
    """

    def __init__(
        self, r: Table, damage: NDArray[np.float64], weight: NDArray[np.float64], tokens: int
    ) -> None:
        self._tokens = tokens
        features, target = self._features(r), log_damage(damage)
        total = weight.sum()
        self._mean = weight @ features / total
        self._offset = weight @ target / total
        centred = features - self._mean
        self._scale = np.sqrt(weight @ centred**2 / total) + 1e-12
        centred = centred / self._scale * np.sqrt(weight)[:, None]
        target = (target - self._offset) * np.sqrt(weight)
        gram = centred.T @ centred + _RIDGE * np.eye(features.shape[1])
        self._slope = np.linalg.solve(gram, centred.T @ target)

    def _features(self, r: Table) -> NDArray[np.float64]:
        share = r / self._tokens
        return np.asarray(np.concatenate([share, share**2], axis=1))

    def log_damage(self, r: Table) -> NDArray[np.float64]:
        """Guess for schedules ``[P, L]``: log damage ``[P]``."""
        centred = (self._features(r) - self._mean) / self._scale
        return np.asarray(self._offset + centred @ self._slope)
