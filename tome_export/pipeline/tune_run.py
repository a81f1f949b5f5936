"""One search, from the scored images to the finalists, within its time."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tome_export.errors import InputError
from tome_export.pipeline.tune_latency import Stopwatch
from tome_export.pipeline.tune_score import Scorer, space_of
from tome_export.progress import Progress
from tome_export.tune.choose import Finalist, Jury, best_within, cheapest, shown
from tome_export.tune.front import BASELINES, Point
from tome_export.tune.search import Search
from tome_export.tune.space import Cost, Rs, Space, rs_of, table_of
from tome_export.tune.table import CostTable

if TYPE_CHECKING:
    from tome_export.patch import MergedModel
    from tome_export.pipeline.tune import TuneRequest
    from tome_export.pipeline.tune_images import TuneImages

FREE = 160
"""Free lists that are measured."""

SEARCH_SHARE, CHOICE_SHARE = 0.75, 0.95
"""Shares of the time limit after which no more is searched, and no finalist measured."""

LATENCY_TRIES = 3
"""Times that a schedule whose real latency is above its target is exchanged for a cheaper one."""


@dataclass(frozen=True)
class Choice:
    """The schedule that meets the target.

    Attributes:
        finalist: It, with its scores.
        latency_ms: Measured; None if latency was not asked for.
        unmerged_ms: Of the unmerged model, measured along with it.
        looks: Finalists that were measured on the validation images in order to choose.
        cut_short: Whether the time limit ended the search or the choice.
    """

    finalist: Finalist
    latency_ms: float | None
    unmerged_ms: float | None
    looks: int
    cut_short: bool


class TuneRun:
    """Searches at once; then ``chosen``, ``best_constant`` and ``front``, in this order.

    The time limit is for what is optional: it begins with the search, after the images were read
    and the cost table measured, and what is begun is finished.

    Args:
        request: What was asked for.
        output_name: Of the model's output.
        model: The patched model.
        images: To measure on.
        scorer: Measures on them.
        progress: Told what happens.

    Attributes:
        space: The schedules of the model.
        table: Of measured latencies; None if they were not asked for.
        search: What was searched.

    Raises:
        InputError: if nothing can meet the target.
        MissingComponentError: if latency is asked for and onnxruntime is not here.
    """

    def __init__(
        self,
        request: TuneRequest,
        output_name: str,
        model: MergedModel,
        images: TuneImages,
        scorer: Scorer,
        progress: Progress,
    ) -> None:
        self._goal, self._limit, self._progress = request.goal, request.time_limit, progress
        self._min_entropy = request.min_entropy or 0.0
        self._images, self._scorer = images, scorer
        self.space: Space = space_of(model)
        self._unmerged: Rs = (0,) * self.space.depth
        right = scorer.unmerged_right[: images.chosen_on]
        self._right = int(right.sum())
        self._needed = self._goal.needed(len(right), self._right) or 0
        self._check_accuracy()
        self._stopwatch: Stopwatch | None = None
        self.table: CostTable | None = None
        self._cost: Cost = self.space.macs
        if self._goal.kind == "target-latency-ms":
            progress.stage("Measure the cost of each layer")
            pixels = images.pixels[: request.batch]
            self._stopwatch = Stopwatch(
                model, pixels, request.batch, request.precision, output_name
            )
            self.table = self._stopwatch.table(self.space, progress)
            self._cost = self.table.latency_ms
        self._budget = self._checked_budget()
        self._start = time.monotonic()
        self._cut_short = False
        self.search = self._searched(request.seed)
        validates = images.chosen_on > images.search
        self._jury = Jury(scorer.validation if validates else None)

    def _late(self) -> bool:
        self._cut_short = time.monotonic() - self._start > CHOICE_SHARE * self._limit
        return self._cut_short

    def _check_accuracy(self) -> None:
        if self._goal.kind == "min-accuracy" and self._needed > self._right:
            share = 100 * self._right / self._images.chosen_on
            raise InputError(
                f"target is {self._goal}; the unmerged model itself has {share:.2f} %, ask for no "
                "more"
            )

    def _cheapest(self) -> Rs:
        """The schedule that costs least: of MACs surely, of milliseconds among those to start from.

        In MACs it is the one that merges most. In time, merging itself may cost more than it saves.
        """
        found = [self.space.most_merged()]
        if self.table is not None:
            found += [r for method in BASELINES for r in self.space.baselines(method)]
            found += [r for row in self.space.neighbours(self._unmerged) if any(r := rs_of(row))]
        return found[int(self._cost(table_of(found)).argmin())]

    def _checked_budget(self) -> float | None:
        unmerged, least = map(float, self._cost(table_of([self._unmerged, self._cheapest()])))
        budget = self._goal.budget(unmerged)
        if budget is None or budget >= least:
            return budget
        if self.table is not None:
            raise InputError(
                f"target is {self._goal}; the fastest schedule by the cost table takes "
                f"{least:.3g} ms and the unmerged model {unmerged:.3g} ms, ask for no less"
            )
        raise InputError(
            f"target is {self._goal}; merging all that can be in every layer still takes "
            f"{least / 1e6:.2f} M of the unmerged model's {unmerged / 1e6:.2f} M, ask for no less"
        )

    def _searched(self, seed: int) -> Search:
        count = self._images.search
        right = int(self._scorer.unmerged_right[:count].sum())
        search = Search(
            self.space,
            self._cost,
            self._scorer.search,
            budget=self._budget,
            needed=self._goal.needed(count, right),
            seed=seed,
            min_entropy=self._min_entropy,
            deadline=self._start + SEARCH_SHARE * self._limit,
            told=self._progress.step,
        )
        self._progress.stage(f"Search on {count} images")
        search.measure(self._unmerged, "constant")
        # The other end, so that a budget is met however little time there is.
        search.measure(self._cheapest(), "constant")
        search.baselines()
        search.free(FREE)
        return search

    def _points(self, method: str = "") -> list[Point]:
        points = [point for point in self.search.considered() if any(point.r)]
        return [point for point in points if method in ("", point.method)]

    @property
    def over_merged(self) -> int:
        """Schedules that were measured, and merge more than is allowed."""
        return len(self.search.points) - len(self.search.considered())

    def chosen(self) -> Choice:
        """The schedule that meets the target.

        Raises:
            InputError: if none does that was found in time; it says what can be reached.
        """
        self._progress.stage(f"Compare finalists on {self._images.chosen_on} images")
        found, latency_ms, unmerged_ms = self._pick(self._points(), self._budget), None, None
        if found is None:
            raise InputError(
                f"no schedule was found for the target, {self._goal}; {self._reachable()}"
            )
        if self._stopwatch is not None:
            found, latency_ms, unmerged_ms = self._timed(found, self._stopwatch)
        ended = self.search.cut_short or self._cut_short
        return Choice(found, latency_ms, unmerged_ms, len(self._jury.finalists), ended)

    def _pick(self, points: list[Point], budget: float | None) -> Finalist | None:
        if budget is not None:
            return best_within(self._jury, points, budget, self._late)
        validation = self._images.chosen_on - self._images.search
        return cheapest(self._jury, points, self._needed, validation, self._late)

    def _timed(self, found: Finalist, stopwatch: Stopwatch) -> tuple[Finalist, float, float]:
        """Run the chosen schedule for real; where it is too slow, choose a cheaper one."""
        target, reached, unmerged = self._goal.value, [], 0.0
        budget, cheaper = target, found
        for _ in range(LATENCY_TRIES):
            self._progress.stage("Run the chosen schedule")
            latency, unmerged = stopwatch.latency_ms([cheaper.point.r, self._unmerged])
            reached.append(latency)
            if latency <= target:
                return cheaper, latency, unmerged
            budget = min(budget, cheaper.point.cost) * target / latency * 0.99
            picked = self._pick(self._points(), budget)
            if picked is None:
                break
            cheaper = picked
        raise InputError(
            f"target is {self._goal}; the fastest schedule that was run takes {min(reached):.3g} "
            f"ms, unmerged {unmerged:.3g} ms: ask for more time, or less load on this machine"
        )

    def _reachable(self) -> str:
        """The best there is, for a target that nothing meets."""
        limit = f"the time limit of {self._limit:g} s was reached, "
        late = limit if self.search.cut_short or self._cut_short else ""
        if self.over_merged:
            late += f"{self.over_merged} schedules fall under --min-entropy {self._min_entropy:g}, "
        points = [point for point in self._points() if point.score.complete]
        if not points:
            return f"{late}none was measured whole; give more with --time-limit"
        best = max(points, key=lambda p: (p.score.correct, -p.score.damage, p.r))
        whole = self._jury.look(best)
        return (
            f"{late}the best that was found has {100 * whole.correct / whole.images:.2f} % "
            f"(unmerged {100 * self._right / whole.images:.2f} %): {','.join(map(str, best.r))}"
        )

    def best_constant(self) -> Finalist | None:
        """The constant r that a user without a search would be best off with."""
        return self._pick(self._points("constant"), self._budget)

    def front(self) -> list[Finalist]:
        """What the picture shows, each point measured on the images that the choice is made on."""
        self._progress.stage("Measure the front")
        points = shown(self._points(), self._jury)
        # Every fourth first: if time runs out, the picture is coarse and not cut off.
        for offset in range(4):
            for point in points[offset::4]:
                if self._late():
                    break
                self._jury.look(point)
        looked = self._jury.finalists
        return [looked[point.r] for point in points if point.r in looked]
