"""The measured cost table of a model on ONNX Runtime, and real runs of single schedules."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tome_export.artifact import MODEL
from tome_export.errors import InputError
from tome_export.merge.schedule import Schedule
from tome_export.progress import Progress
from tome_export.runtime.registry import ORT_CPU, backend_of
from tome_export.runtime.runner import Runnable
from tome_export.spec import INPUT_NAME, BatchRange, Precision
from tome_export.tune.space import Rs, Space
from tome_export.tune.table import CostTable, Measurement, fit

if TYPE_CHECKING:
    from tome_export.patch import MergedModel

SCHEDULES = 6
"""Schedules that the table is measured on: unmerged, fully merged, and constant r in between."""

RUNS, FEWEST_RUNS = 15, 3
"""Runs per measurement, after two to warm up, and where time is short."""

HOPELESS = 4.0
"""A target of so small a part of what the schedule that merges most takes, none comes near."""


class Stopwatch:
    """Exports schedules and times them on ONNX Runtime's CPU.

    Args:
        model: The patched model.
        pixels: At least one image ``[B, C, H, W]`` float32; repeated to fill a batch.
        batch: Images per run.
        precision: Of the exported model.
        output_name: Of the model's output.
    """

    def __init__(
        self,
        model: MergedModel,
        pixels: np.ndarray[Any, np.dtype[np.float32]],
        batch: int,
        precision: Precision,
        output_name: str,
    ) -> None:
        self._model = model
        self._images = np.resize(pixels, (batch, *pixels.shape[1:]))
        self._batch = BatchRange(batch, batch, batch)
        self._precision = precision
        self._output_name = output_name

    def table(self, space: Space, progress: Progress, target_ms: float, until: float) -> CostTable:
        """Measure and fit the cost table.

        Args:
            space: The schedules of the model.
            progress: Told of the schedules done.
            target_ms: What a run may take.
            until: In seconds of ``time.monotonic``; after that no more schedules are measured than
                the two that it takes.

        Raises:
            InputError: if the target is out of reach of any schedule.
            MissingComponentError: if onnxruntime is not here.
            ExportError: if a model cannot be exported or run.
        """
        from tome_export.runtime.profile import profile_onnx

        measured: list[Measurement] = []
        schedules, runs = _spread(space), RUNS
        for done, r in enumerate(schedules):
            if done > 1 and time.monotonic() >= until:
                break
            with tempfile.TemporaryDirectory(prefix="tome-export-") as folder:
                path = self._export(r, Path(folder))
                if not measured:
                    run_ms = self._times([path], 1)[0]
                    if run_ms > HOPELESS * target_ms:
                        raise InputError(
                            f"target is latency of at most {target_ms:g} ms; merging all that can "
                            f"be in every layer takes {run_ms:.3g} ms, ask for no less"
                        )
                    # Each schedule is run with the profiler and without.
                    each_ms = 1e3 * (until - time.monotonic()) / len(schedules)
                    runs = int(min(RUNS, max(FEWEST_RUNS, each_ms / (2 * run_ms))))
                profile = profile_onnx(path, self._images, runs)
                run_ms = self._times([path], runs)[0]
            layers = tuple(profile.layers_ms)
            inside = sum(sum(groups.values()) for groups in layers)
            measured.append(Measurement(r, layers, profile.total_ms - inside, run_ms))
            progress.step("schedules profiled", done + 1, len(schedules))
        return fit(space, measured, self._batch.opt, self._precision)

    def latency_ms(self, schedules: Sequence[Rs]) -> list[float]:
        """Median time of a run of each schedule, all taken in turn.

        Raises:
            MissingComponentError: if onnxruntime is not here.
            ExportError: if a model cannot be exported or run.
        """
        with tempfile.TemporaryDirectory(prefix="tome-export-") as folder:
            paths = []
            for index, r in enumerate(schedules):
                (Path(folder) / str(index)).mkdir()
                paths.append(self._export(r, Path(folder) / str(index)))
            return self._times(paths)

    def _export(self, r: Rs, folder: Path) -> Path:
        from tome_export.onnx.export import ExportOptions, onnx_from_model
        from tome_export.runtime.model import rescheduled

        model = rescheduled(self._model, Schedule(per_layer=r))
        options = ExportOptions(precision=self._precision, batch=self._batch)
        onnx_from_model(model, folder / MODEL, options, self._output_name)
        return folder / MODEL

    def _runnable(self, path: Path) -> Runnable:
        return Runnable(
            label=path.parent.name,
            precision=self._precision,
            output_name=self._output_name,
            graph=path,
        )

    def _times(self, paths: Sequence[Path], count: int = RUNS) -> list[float]:
        from tome_export.runtime.timing import paired

        inputs = {INPUT_NAME: self._images}
        with ExitStack() as stack:
            runners = [
                stack.enter_context(backend_of(ORT_CPU).open(self._runnable(path)))
                for path in paths
            ]
            runs = {
                str(index): lambda runner=runner: runner.infer(inputs)
                for index, runner in enumerate(runners)
            }
            seconds = paired(runs, count)
        return [1e3 * float(np.median(values)) for values in seconds.values()]


def _spread(space: Space) -> list[Rs]:
    """Fully merged, unmerged, and constant schedules evenly between."""
    constant = space.baselines("constant")
    index = np.unique(np.linspace(0, len(constant) - 1, SCHEDULES).round().astype(int))[1:-1]
    picked = [space.most_merged(), (0,) * space.depth, *(constant[i] for i in index)]
    return list(dict.fromkeys(picked))
