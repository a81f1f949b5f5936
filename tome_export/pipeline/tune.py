"""``tome-export tune``: search a model's per-layer schedule for one target."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tome_export.errors import InputError, UsageError
from tome_export.merge.schedule import Schedule
from tome_export.pipeline.progress import Progress, Silent
from tome_export.pipeline.tune_images import SAMPLES, TuneImages, sized, tune_images
from tome_export.pipeline.tune_latency import Stopwatch
from tome_export.pipeline.tune_result import values_of
from tome_export.pipeline.tune_score import Scorer, space_of
from tome_export.spec import Precision
from tome_export.tune.choose import Finalist, Jury, best_within, cheapest, shown
from tome_export.tune.front import Point
from tome_export.tune.goal import Goal
from tome_export.tune.schedule_file import check_writable, read_schedule, write_schedule
from tome_export.tune.search import Search
from tome_export.tune.space import Cost, Rs, Space, table_of
from tome_export.tune.table import CostTable

if TYPE_CHECKING:
    from tome_export.models import LoadedModel

FREE = 160
"""Free lists that are measured."""

SEARCH_SHARE, TOTAL_SHARE = 0.75, 0.95
"""Shares of the time limit after which no more is searched, and no finalist measured."""

LATENCY_TRIES = 3
"""Times that a schedule whose real latency is above its target is exchanged for a cheaper one."""


@dataclass(frozen=True)
class TuneRequest:
    """What to search.

    Attributes:
        model: Recipe name, ``timm:<name>`` or ``module:function``.
        goal: The target.
        output: The schedule file.
        data: A folder or shards of images; ``samples`` for those that come along.
        limit: Most images; None for as many as a search in minutes can take.
        weights: ``pretrained``, ``random`` or the path of a checkpoint.
        batch: Images per run, for latency.
        precision: Of the model whose latency is measured; classes are counted in fp32.
        time_limit: Seconds of search after which the best by then is taken.
        seed: Of the images drawn, their split, the search, and of random weights.
        force: Replace an existing file.
    """

    model: str
    goal: Goal
    output: Path
    data: tuple[str, ...] = (SAMPLES,)
    limit: int | None = None
    weights: str = "pretrained"
    batch: int = 1
    precision: Precision = "fp32"
    time_limit: float = 600.0
    seed: int = 0
    force: bool = False


@dataclass(frozen=True)
class TuneResult:
    """What a search found.

    Attributes:
        path: The schedule file.
        values: Its content.
    """

    path: Path
    values: dict[str, Any]


def tune(request: TuneRequest, progress: Progress | None = None) -> TuneResult:
    """Search a schedule and write it to a file; nothing is written if none meets the target.

    Raises:
        InputError: if model, weights, data or output are not usable, or no schedule that merges
            anything meets the target; the message says what can be reached.
        UsageError: if a number is out of range.
        MissingComponentError: if latency is asked for and onnxruntime is not here.
    """
    start = time.monotonic()
    progress = progress or Silent()
    _check_numbers(request)
    check_writable(request.output, force=request.force)
    run = _Run(request, progress)
    finalist, latency_ms = run.chosen()
    progress.stage("Measure the front")
    finalists = run.front()
    values = values_of(
        model=run.loaded.recipe.name,
        goal=request.goal,
        images=run.images,
        scorer=run.scorer,
        space=run.space,
        chosen=finalist,
        constant=run.best_constant(),
        front=finalists,
        latency=run.latency_ms,
        measured_ms=latency_ms,
        unmerged_ms=run.unmerged_ms,
        table=run.table,
        looks=run.looks,
        searched=len(run.search.points),
        ended_by_time=run.search.out_of_time,
        weights=run.loaded.weights,
        batch=request.batch,
        precision=request.precision,
        seconds=time.monotonic() - start,
    )
    write_schedule(request.output, values, force=request.force)
    return TuneResult(request.output, values)


def schedule_from_file(path: Path) -> Schedule:
    """The schedule in a file that ``tune`` wrote.

    Raises:
        InputError: if it is not such a file.
    """
    return Schedule(per_layer=read_schedule(path).schedule)


def goal_of(name: str, value: Any) -> Goal:
    """A target from the command line's option of that name, with underscores.

    Raises:
        InputError: if the value is not one.
    """
    if name == "target_latency_ms":
        return Goal.target_latency(value)
    return Goal.target_macs(value) if name == "target_macs" else Goal.min_accuracy(value)


def _check_numbers(request: TuneRequest) -> None:
    if request.batch < 1:
        raise UsageError(f"--batch is {request.batch}; expected at least 1 image per run")
    if not request.time_limit > 0:
        raise UsageError(f"--time-limit is {request.time_limit:g}; expected seconds above 0")


class _Run:
    """One search, from the model to the finalists."""

    def __init__(self, request: TuneRequest, progress: Progress) -> None:
        self._request, self._progress = request, progress
        self.loaded, self.model = _load(request, progress)
        self.space: Space = space_of(self.model)
        self.images: TuneImages = self._read()
        progress.stage(f"Measure the unmerged model on {len(self.images.pixels)} images")
        self.scorer = Scorer(self.model, self.images)
        self.table: CostTable | None = None
        self.unmerged_ms: float | None = None
        self._stopwatch: Stopwatch | None = None
        self._cost: Cost = self.space.macs
        self._check_accuracy()
        if request.goal.kind == "target-latency-ms":
            self._measure_costs()
        self.unmerged_cost = float(self._cost(table_of([(0,) * self.space.depth]))[0])
        self._check_cost()
        # Reading images and measuring costs take what they take; the limit is for what is optional.
        self._start = time.monotonic()
        self.search = self._searched()
        validates = len(self.images.pixels) > self.images.search
        validate = self.scorer.validation if validates else None
        self._jury = Jury(validate)
        self.looks = 0

    @property
    def _all(self) -> tuple[int, int]:
        """Images, and how many of them the unmerged model has right."""
        right = self.scorer.unmerged_right
        return len(right), int(right.sum())

    @property
    def _needed(self) -> int:
        return self._request.goal.needed(*self._all) or 0

    def _late(self, share: float = TOTAL_SHARE) -> bool:
        return time.monotonic() - self._start > share * self._request.time_limit

    def _read(self) -> TuneImages:
        self._progress.stage("Read images")
        recipe = sized(self.loaded.recipe, self.model.input_size)
        request = self._request
        return tune_images(
            recipe,
            self.model.macs(merged=False),
            _classes(self.model),
            request.data,
            request.limit,
            request.seed,
            self._progress,
        )

    def _check_accuracy(self) -> None:
        goal = self._request.goal
        images, right = self._all
        if goal.kind == "min-accuracy" and self._needed > right:
            raise InputError(
                f"target is {goal}; the unmerged model itself has {100 * right / images:.2f} %, "
                "ask for no more"
            )

    def _measure_costs(self) -> None:
        self._progress.stage("Measure the cost of each layer")
        self._stopwatch = Stopwatch(
            self.model,
            self.images.pixels[: self._request.batch],
            self._request.batch,
            self._request.precision,
            self.loaded.recipe.output_name,
        )
        self.table = self._stopwatch.table(self.space, self._progress)
        self._cost = self.table.latency_ms

    def _check_cost(self) -> None:
        budget = self._request.goal.budget(self.unmerged_cost)
        least = float(self._cost(table_of([self.space.most_merged()]))[0])
        if budget is None or budget >= least:
            return
        raise InputError(
            f"target is {self._request.goal}; merging half of the tokens in every layer still "
            f"takes {self._amount(least)} of the unmerged model's "
            f"{self._amount(self.unmerged_cost)}, ask for no less"
        )

    def _amount(self, cost: float) -> str:
        return f"{cost:.3g} ms" if self.table else f"{cost / 1e6:.2f} M"

    def _searched(self) -> Search:
        goal, request = self._request.goal, self._request
        right = self.scorer.unmerged_right[: self.images.search]
        search = Search(
            self.space,
            self._cost,
            self.scorer.search,
            budget=goal.budget(self.unmerged_cost),
            needed=goal.needed(len(right), int(right.sum())),
            seed=request.seed,
            deadline=self._start + SEARCH_SHARE * request.time_limit,
            told=lambda method, done, count: self._progress.detail(f"{method}: {done}/{count}"),
        )
        self._progress.stage(f"Search on {self.images.search} images")
        search.measure((0,) * self.space.depth, "constant")
        # The other end, so that a budget is met however little time there is.
        search.measure(self.space.most_merged(), "constant")
        search.baselines()
        search.free(FREE)
        return search

    def _points(self) -> list[Point]:
        return [point for point in self.search.points.values() if any(point.r)]

    def chosen(self) -> tuple[Finalist, float | None]:
        """The schedule that meets the target, and its measured latency if that was asked for."""
        goal = self._request.goal
        self._progress.stage(f"Compare finalists on {len(self.images.pixels)} images")
        found, latency_ms = self._pick(goal.budget(self.unmerged_cost)), None
        if self._stopwatch is not None and found is not None:
            found, latency_ms = self._timed(found, self._stopwatch)
        self.looks = len(self._jury.finalists)
        if found is None:
            raise InputError(f"no schedule was found for the target, {goal}; {self._reachable()}")
        return found, latency_ms

    def _pick(self, budget: float | None) -> Finalist | None:
        if budget is not None:
            return best_within(self._jury, self._points(), budget, self._late)
        validation = len(self.images.pixels) - self.images.search
        return cheapest(self._jury, self._points(), self._needed, validation, self._late)

    def _timed(self, found: Finalist, stopwatch: Stopwatch) -> tuple[Finalist, float]:
        """Run the chosen schedule for real; where it is too slow, choose a cheaper one."""
        target, budget = self._request.goal.value, self._request.goal.value
        reached = []
        for _ in range(LATENCY_TRIES):
            self._progress.stage("Run the chosen schedule")
            unmerged: Rs = (0,) * self.space.depth
            latency, self.unmerged_ms = stopwatch.latency_ms([found.point.r, unmerged])
            reached.append(latency)
            if latency <= target:
                return found, latency
            budget = min(budget, found.point.cost) * target / latency * 0.99
            cheaper = self._pick(budget)
            if cheaper is None:
                break
            found = cheaper
        raise InputError(
            f"target is {self._request.goal}; the fastest schedule that was run takes "
            f"{min(reached):.3g} ms, unmerged {self.unmerged_ms:.3g} ms: ask for more time, or "
            "less load on this machine"
        )

    def _reachable(self) -> str:
        """The best there is, for a target that nothing meets."""
        points = [point for point in self._points() if point.score.complete]
        if not points:
            return "none was measured within the time limit; give more with --time-limit"
        best = max(points, key=lambda p: (p.score.correct, -p.score.damage))
        whole = self._jury.look(best)
        return (
            f"the best that was found has {100 * whole.correct / whole.images:.2f} % (unmerged "
            f"{100 * self._all[1] / self._all[0]:.2f} %): {','.join(map(str, best.r))}"
        )

    def best_constant(self) -> Finalist | None:
        """The constant r that a user without a search would be best off with."""
        points = [point for point in self._points() if point.method == "constant"]
        budget = self._request.goal.budget(self.unmerged_cost)
        if budget is not None:
            return best_within(self._jury, points, budget, self._late)
        validation = len(self.images.pixels) - self.images.search
        return cheapest(self._jury, points, self._needed, validation, self._late)

    def front(self) -> list[Finalist]:
        """What the picture shows, each point measured on all images."""
        points = shown(self._points(), self._jury)
        # Every fourth first: if time runs out, the picture is coarse and not cut off.
        for offset in range(4):
            for point in points[offset::4]:
                if self._late():
                    break
                self._jury.look(point)
        looked = self._jury.finalists
        return [looked[point.r] for point in points if point.r in looked]

    def latency_ms(self, r: Rs) -> float | None:
        """As the cost table predicts it; None without a table."""
        return None if self.table is None else float(self.table.latency_ms(table_of([r]))[0])


def _load(request: TuneRequest, progress: Progress) -> tuple[LoadedModel, Any]:
    from tome_export.models import resolve
    from tome_export.patch import patch

    progress.stage(f"Load {request.model}")
    recipe = resolve(request.model)
    if recipe.output_name != "logits":
        raise InputError(
            f"{recipe.name} gives {recipe.output_name}, not classes to count; tune a classifier, "
            "or give a schedule to 'tome-export build' yourself"
        )
    loaded = recipe.load(weights=request.weights, seed=request.seed)
    progress.detail(f"weights: {loaded.weights.kind}, {loaded.weights.source}")
    return loaded, patch(loaded.module, 0, prop_attn=recipe.prop_attn).eval()


def _classes(model: Any) -> int:
    from tome_export.pipeline.manifest import output_width

    return int(output_width(model))
