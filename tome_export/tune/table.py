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
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tome_export.artifact.schedule import GroupCost, LatencyCosts, LayerCost
from tome_export.merge.macs import BlockCost
from tome_export.spec import Precision
from tome_export.tune.space import Space, Table

MERGING = ("match", "merge")
"""Groups that only layers with r above 0 have."""

_EXPONENTS: Mapping[str, tuple[int, ...]] = {"mlp": (0, 1)}


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
    """Predicts the latency of any schedule of a space from fitted costs."""

    space: Space
    costs: LatencyCosts

    def latency_ms(self, r: Table) -> NDArray[np.float64]:
        """Milliseconds ``[P]`` of schedules ``[P, L]``."""
        nodes = _nodes_ms(self.space, self.costs.layers, self.costs.outside_ms, r)
        return np.asarray(self.costs.run_over_nodes * nodes)


def fit(
    space: Space, measurements: Sequence[Measurement], batch: int, precision: Precision
) -> CostTable:
    """Fit a cost table.

    Args:
        space: The schedules of the model.
        measurements: At least two, of different schedules.
        batch: Images per run.
        precision: Of the model.
    """
    features: dict[tuple[BlockCost, str], list[NDArray[np.float64]]] = defaultdict(list)
    times: dict[tuple[BlockCost, str], list[float]] = defaultdict(list)
    for measured in measurements:
        entering = space.tokens_in(np.array([measured.r], dtype=np.int64))[0]
        for block, groups, tokens, r in zip(
            space.blocks, measured.layers, entering, measured.r, strict=True
        ):
            for group, ms in groups.items():
                features[block, group].append(_features(group, tokens, tokens - r))
                times[block, group].append(ms)
    fitted: dict[BlockCost, list[GroupCost]] = defaultdict(list)
    for (block, group), rows in features.items():
        cost = GroupCost(
            group=group,
            of="tokens_out" if group == "mlp" else "tokens_in",
            coefficients=_not_negative(np.array(rows), np.array(times[block, group])).tolist(),
        )
        fitted[block].append(cost)
    layers = tuple(
        LayerCost(
            layers=tuple(i for i, block in enumerate(space.blocks) if block == kind),
            groups=tuple(groups),
        )
        for kind, groups in fitted.items()
    )
    outside = float(np.mean([measured.outside_ms for measured in measurements]))
    nodes = _nodes_ms(space, layers, outside, np.array([m.r for m in measurements], dtype=np.int64))
    runs = np.array([measured.run_ms for measured in measurements])
    factor = float(nodes @ runs / (nodes @ nodes))
    costs = LatencyCosts(
        outside_ms=outside,
        run_over_nodes=factor,
        residual=float(np.sqrt(np.mean((factor * nodes / runs - 1) ** 2))),
        measurements=len(measurements),
        layers=layers,
        batch=batch,
        precision=precision,
    )
    return CostTable(space, costs)


def _features(group: str, entering: Any, leaving: Any) -> NDArray[np.float64]:
    tokens = np.asarray(leaving if group == "mlp" else entering, dtype=np.float64)
    return np.stack([tokens**power for power in _EXPONENTS.get(group, (0, 1, 2))], axis=-1)


def _nodes_ms(
    space: Space, layers: Sequence[LayerCost], outside_ms: float, r: Table
) -> NDArray[np.float64]:
    entering = space.tokens_in(r)
    total = np.full(len(r), outside_ms)
    groups_of = {layer: cost.groups for cost in layers for layer in cost.layers}
    for layer in range(space.depth):
        before, merged = entering[:, layer], r[:, layer]
        for cost in groups_of.get(layer, ()):
            ms = _features(cost.group, before, before - merged) @ np.array(cost.coefficients)
            total += np.where(merged > 0, ms, 0.0) if cost.group in MERGING else ms
    return np.asarray(total)


def _not_negative(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
    """The x >= 0 with the smallest ``|a x - b|``; columns may be of any scale."""
    from scipy.optimize import nnls

    scale = np.linalg.norm(a, axis=0)
    scale[scale == 0] = 1.0
    return np.asarray(nnls(a / scale, b)[0] / scale)
