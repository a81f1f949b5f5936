"""What each layer costs in milliseconds on ONNX Runtime's CPU, and real runs of single schedules.

The costs are fitted to measured schedules. Every group of a layer has a form that its arithmetic
suggests, for N tokens in and K out:

    attention, match, merge, norm and the rest      a + b N + c N^2
    mlp                                             a + b K

Coefficients are not negative (non-negative least squares, Lawson and Hanson 1974): no group gets
faster with more tokens, which also keeps the fit from running wild between the measured points.
Layers with the same arithmetic share their coefficients; what is outside the layers is constant.

The sum of a profile's nodes is not the time of a run: there is time between nodes, and profiling
itself takes some. One factor, the least squares fit of the real run to the sum, makes up for it.
"""

from __future__ import annotations

import tempfile
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from tome_export.artifact import MODEL
from tome_export.artifact.schedule import GroupCost, LatencyCosts, LayerCost
from tome_export.errors import InputError
from tome_export.merge.macs import BlockCost
from tome_export.merge.schedule import Schedule
from tome_export.progress import Progress
from tome_export.runtime.registry import ORT_CPU, backend_of
from tome_export.runtime.runner import Runnable
from tome_export.spec import INPUT_NAME, BatchRange, Precision
from tome_export.tune.space import Rs, ScheduleTable, SearchSpace, table_of

if TYPE_CHECKING:
    from tome_export.patch import MergedModel

SCHEDULES = 6
"""Schedules that are measured: unmerged, fully merged, and constant r in between."""

RUNS, FEWEST_RUNS = 15, 3
"""Runs per measurement, after two to warm up, and where time is short."""

HOPELESS = 4.0
"""A target of so small a part of what the schedule that merges most takes, none comes near."""

MERGING = ("match", "merge")
"""Groups that only layers with r above 0 have."""


@dataclass(frozen=True)
class Measurement:
    """A profiled schedule: milliseconds by group of each layer, of all else, and of a whole run."""

    r: Rs
    layers: tuple[Mapping[str, float], ...]
    outside_ms: float
    run_ms: float


def fit(
    space: SearchSpace, measurements: Sequence[Measurement], batch: int, precision: Precision
) -> LatencyCosts:
    """Fit the costs of the layers to at least two different schedules."""
    schedules = table_of([measured.r for measured in measurements])
    samples: dict[tuple[BlockCost, str], list[tuple[NDArray[np.float64], float]]]
    samples = defaultdict(list)
    for measured, entering in zip(measurements, space.tokens_in(schedules), strict=True):
        for block, groups, tokens, r in zip(
            space.blocks, measured.layers, entering, measured.r, strict=True
        ):
            for group, ms in groups.items():
                samples[block, group].append((_powers(group, tokens, tokens - r), ms))
    layers = tuple(
        LayerCost(
            layers=tuple(i for i, block in enumerate(space.blocks) if block == kind),
            groups=tuple(
                GroupCost(
                    group=group,
                    of="tokens_out" if group == "mlp" else "tokens_in",
                    coefficients=_not_negative(*map(np.array, zip(*rows, strict=True))),
                )
                for (block, group), rows in samples.items()
                if block == kind
            ),
        )
        for kind in dict.fromkeys(block for block, _ in samples)
    )
    costs = LatencyCosts(
        outside_ms=float(np.mean([measured.outside_ms for measured in measurements])),
        run_over_nodes=1.0,
        residual=0.0,
        measurements=len(measurements),
        layers=layers,
        batch=batch,
        precision=precision,
    )
    nodes = predicted_ms(space, costs, schedules)
    runs = np.array([measured.run_ms for measured in measurements])
    factor = float(nodes @ runs / (nodes @ nodes))
    residual = float(np.sqrt(np.mean((factor * nodes / runs - 1) ** 2)))
    return costs.model_copy(update={"run_over_nodes": factor, "residual": residual})


def predicted_ms(space: SearchSpace, costs: LatencyCosts, r: ScheduleTable) -> NDArray[np.float64]:
    """Milliseconds ``[P]`` of schedules ``[P, L]`` by fitted costs."""
    total = np.full(len(r), costs.outside_ms)
    groups_of = {layer: cost.groups for cost in costs.layers for layer in cost.layers}
    for layer, (tokens, removed) in enumerate(zip(space.tokens_in(r).T, r.T, strict=True)):
        for cost in groups_of.get(layer, ()):
            ms = _powers(cost.group, tokens, tokens - removed) @ np.array(cost.coefficients)
            total += np.where(removed > 0, ms, 0.0) if cost.group in MERGING else ms
    return np.asarray(costs.run_over_nodes * total)


def _powers(group: str, tokens_in: Any, tokens_out: Any) -> NDArray[np.float64]:
    """The powers of the token count that a group depends on, ``[..., 2 or 3]``."""
    count, powers = (tokens_out, (0, 1)) if group == "mlp" else (tokens_in, (0, 1, 2))
    return np.stack([np.asarray(count, np.float64) ** power for power in powers], axis=-1)


def _not_negative(a: NDArray[np.float64], b: NDArray[np.float64]) -> tuple[float, ...]:
    """The x >= 0 with the smallest ``|a x - b|``; columns may be of any scale."""
    from scipy.optimize import nnls

    scale = np.linalg.norm(a, axis=0)
    scale[scale == 0] = 1.0
    return tuple((nnls(a / scale, b)[0] / scale).tolist())


@dataclass(frozen=True)
class Stopwatch:
    """Exports schedules of a model and times them on one batch of images ``[B, C, H, W]``."""

    model: MergedModel
    images: NDArray[np.float32]
    precision: Precision
    output_name: str

    def costs(
        self, space: SearchSpace, progress: Progress, target_ms: float, until: float
    ) -> LatencyCosts:
        """Measure schedules and fit the costs of the layers.

        After ``until``, in seconds of ``time.monotonic``, no more schedules are measured than the
        two that it takes.
        """
        from tome_export.runtime.profile import profile_onnx

        measured: list[Measurement] = []
        schedules, runs = _schedules_to_measure(space), RUNS
        for done, r in enumerate(schedules):
            if done > 1 and time.monotonic() >= until:
                break
            with tempfile.TemporaryDirectory(prefix="tome-export-") as folder:
                path = Path(folder) / MODEL
                self._export(r, path)
                if not measured:
                    run_ms = self._runs_ms([path], 1)[0]
                    if run_ms > HOPELESS * target_ms:
                        raise InputError(
                            f"target is latency of at most {target_ms:g} ms; merging all that can "
                            f"be in every layer takes {run_ms:.3g} ms, ask for no less"
                        )
                    # Each schedule is run with the profiler and without.
                    each_ms = 1e3 * (until - time.monotonic()) / len(schedules)
                    runs = int(min(RUNS, max(FEWEST_RUNS, each_ms / (2 * run_ms))))
                profile = profile_onnx(path, self.images, runs)
                run_ms = self._runs_ms([path], runs)[0]
            layers = tuple(profile.layers_ms)
            inside = sum(sum(groups.values()) for groups in layers)
            measured.append(Measurement(r, layers, profile.total_ms - inside, run_ms))
            progress.step("schedules profiled", done + 1, len(schedules))
        return fit(space, measured, len(self.images), self.precision)

    def runs_ms(self, schedules: Sequence[Rs]) -> list[float]:
        """Median time of a run of each schedule, all taken in turn."""
        with tempfile.TemporaryDirectory(prefix="tome-export-") as folder:
            paths = [Path(folder) / str(index) / MODEL for index in range(len(schedules))]
            for r, path in zip(schedules, paths, strict=True):
                path.parent.mkdir()
                self._export(r, path)
            return self._runs_ms(paths, RUNS)

    def _export(self, r: Rs, path: Path) -> None:
        from tome_export.onnx.export import ExportOptions, onnx_from_model
        from tome_export.runtime.model import rescheduled

        model, count = rescheduled(self.model, Schedule(per_layer=r)), len(self.images)
        options = ExportOptions(precision=self.precision, batch=BatchRange(count, count, count))
        onnx_from_model(model, path, options, self.output_name)

    def _runs_ms(self, paths: Sequence[Path], count: int) -> list[float]:
        from tome_export.runtime.timing import paired

        with ExitStack() as stack:
            runs = {}
            for path in paths:
                runnable = Runnable(
                    label=path.parent.name,
                    precision=self.precision,
                    output_name=self.output_name,
                    graph=path,
                )
                runner = stack.enter_context(backend_of(ORT_CPU).open(runnable))
                runs[str(path)] = partial(runner.infer, {INPUT_NAME: self.images})
            seconds = paired(runs, count)
        return [1e3 * float(np.median(values)) for values in seconds.values()]


def _schedules_to_measure(space: SearchSpace) -> list[Rs]:
    """Fully merged, unmerged, and constant schedules evenly between."""
    constant = space.baselines("constant")
    index = np.unique(np.linspace(0, len(constant) - 1, SCHEDULES).round().astype(int))[1:-1]
    picked = [space.most_merged(), (0,) * space.depth, *(constant[i] for i in index)]
    return list(dict.fromkeys(picked))
