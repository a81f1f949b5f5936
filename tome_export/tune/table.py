"""What each layer costs in milliseconds, as a function of its tokens, fitted to measurements.

Every group of a layer has a form that its arithmetic suggests, for N tokens in and K out:

    attention, match, merge, norm and the rest      a + b N + c N^2
    mlp                                             a + b K

Coefficients are not negative (non-negative least squares, Lawson and Hanson 1974): no group gets
faster with more tokens, which also keeps the fit from running wild between the measured points.
Layers with the same arithmetic share their coefficients; what is outside the layers is constant.

The sum of a profile's nodes is not the time of a run: there is time between nodes, and profiling
itself takes some. One factor, the least squares fit of the real run to the sum, makes up for it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from tome_export.artifact.schedule import GroupCost, LatencyCosts, LayerCost
from tome_export.merge.macs import BlockCost
from tome_export.spec import Precision
from tome_export.tune.space import Space, Table

MERGING = ("match", "merge")
"""Groups that only layers with r above 0 have."""

_EXPONENTS: Mapping[str, tuple[int, ...]] = {"mlp": (0, 1)}

Key = tuple[BlockCost, str]
"""Layers of one arithmetic, and a group of theirs."""


@dataclass(frozen=True)
class Measurement:
    """One profiled schedule.

    Attributes:
        r: Of each layer.
        layers: Milliseconds by group, of each layer.
        outside_ms: Of all nodes outside the layers.
        run_ms: Of a whole run without the profiler, median.
    """

    r: tuple[int, ...]
    layers: tuple[Mapping[str, float], ...]
    outside_ms: float
    run_ms: float


@dataclass(frozen=True)
class CostTable:
    """Predicts the latency of any schedule.

    Attributes:
        space: The schedules.
        coefficients: Of each group of each kind of layer, in ms.
        outside_ms: Outside the layers.
        factor: From the sum of the nodes to a run.
        residual: Root mean square of the relative error over the measured schedules.
        measurements: How many schedules were measured.
    """

    space: Space
    coefficients: Mapping[Key, NDArray[np.float64]]
    outside_ms: float
    factor: float
    residual: float
    measurements: int

    def latency_ms(self, r: Table) -> NDArray[np.float64]:
        """Milliseconds ``[P]`` of schedules ``[P, L]``."""
        return np.asarray(self.factor * _nodes_ms(self, r))

    def costs(self, batch: int, precision: Precision) -> LatencyCosts:
        """For the schedule file."""
        groups: dict[BlockCost, list[GroupCost]] = defaultdict(list)
        for (block, group), values in self.coefficients.items():
            of: Literal["tokens_in", "tokens_out"] = "tokens_out" if group == "mlp" else "tokens_in"
            cost = GroupCost(group=group, of=of, coefficients=tuple(map(float, values)))
            groups[block].append(cost)
        return LatencyCosts(
            outside_ms=self.outside_ms,
            run_over_nodes=self.factor,
            residual=self.residual,
            measurements=self.measurements,
            layers=tuple(
                LayerCost(
                    layers=tuple(i for i, block in enumerate(self.space.blocks) if block == kind),
                    groups=tuple(costs),
                )
                for kind, costs in groups.items()
            ),
            batch=batch,
            precision=precision,
        )


def fit(space: Space, measurements: Sequence[Measurement]) -> CostTable:
    """Fit a cost table.

    Args:
        space: The schedules of the model.
        measurements: At least two, of different schedules.
    """
    features: dict[Key, list[NDArray[np.float64]]] = defaultdict(list)
    times: dict[Key, list[float]] = defaultdict(list)
    for measured in measurements:
        entering = space.tokens_in(np.array([measured.r], dtype=np.int64))[0]
        for block, groups, tokens, r in zip(
            space.blocks, measured.layers, entering, measured.r, strict=True
        ):
            for group, ms in groups.items():
                features[block, group].append(_features(group, tokens, tokens - r))
                times[block, group].append(ms)
    coefficients = {
        key: _not_negative(np.array(rows), np.array(times[key])) for key, rows in features.items()
    }
    outside = float(np.mean([measured.outside_ms for measured in measurements]))
    raw = CostTable(space, coefficients, outside, 1.0, 0.0, len(measurements))
    nodes = _nodes_ms(raw, np.array([m.r for m in measurements], dtype=np.int64))
    runs = np.array([measured.run_ms for measured in measurements])
    factor = float(nodes @ runs / (nodes @ nodes))
    residual = float(np.sqrt(np.mean((factor * nodes / runs - 1) ** 2)))
    return CostTable(space, coefficients, outside, factor, residual, len(measurements))


def _features(group: str, entering: Any, leaving: Any) -> NDArray[np.float64]:
    tokens = np.asarray(leaving if group == "mlp" else entering, dtype=np.float64)
    return np.stack([tokens**power for power in _EXPONENTS.get(group, (0, 1, 2))], axis=-1)


def _nodes_ms(table: CostTable, r: Table) -> NDArray[np.float64]:
    entering = table.space.tokens_in(r)
    total = np.full(len(r), table.outside_ms)
    for layer, block in enumerate(table.space.blocks):
        for (kind, group), values in table.coefficients.items():
            if kind != block:
                continue
            ms = _features(group, entering[:, layer], entering[:, layer] - r[:, layer]) @ values
            total += np.where(r[:, layer] > 0, ms, 0.0) if group in MERGING else ms
    return np.asarray(total)


def _not_negative(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
    """The x >= 0 with the smallest ``|a x - b|``; columns may be of any scale."""
    from scipy.optimize import nnls

    scale = np.linalg.norm(a, axis=0)
    scale[scale == 0] = 1.0
    return np.asarray(nnls(a / scale, b)[0] / scale)
