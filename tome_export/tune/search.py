"""The search for per-layer schedules, on measured damage and exact costs.

Baselines are ToMe's families (arXiv 2210.09461, section 4.1 and appendix C): constant, decreasing
and increasing r. The free list has its own r per layer, as DiffRate's (arXiv 2305.17997); DiffRate
learns it by gradients through a relaxed ranking, which needs training, so here the list is searched
for directly, without any training:

- Pareto local search (Paquete, Chiarandini and Stützle 2004): from points of the front over (cost,
  damage), the neighbours are schedules that merge some tokens more or fewer in one layer, or move
  them between two layers, so that tokens go where they do the least damage for what they save.
- There are hundreds of neighbours and each takes a pass over the images, so a ridge regression of
  the measured damage (``predicted_log_damage``) says which to measure next: the one that promises
  to lie furthest below the front at its cost. Every fourth is one of the best ten by chance.
- Most are sought near the target, one in four anywhere on the front.
- Damage is a divergence from the unmerged model's output, see ``tune.measure``. Top-1 on a few
  hundred images is too coarse to rank by, and so are nearest neighbours; a mean of many small
  changes is not. It is a sum of terms that are never negative: once the sum is past what the front
  does at that cost, the candidate is surely dominated and the remaining images are not looked at.

What is chosen has to hold on more. The search sees its own images only. Finalists are measured on
validation images too, and the target must hold on both together. The validation images are thereby
used to accept or reject finalists and for nothing else; how many were looked at is reported,
because the more there are, the more the validation accuracy of the chosen one flatters. So where
there are enough images, a third part is held out that nothing here looks at, and the interval that
is reported comes from it alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from tome_export.artifact.schedule import Method
from tome_export.tune.space import Cost, Rs, ScheduleTable, SearchSpace, rs_of, table_of

BASELINES: dict[Method, int] = {"constant": 32, "decreasing": 16, "increasing": 16}
"""Most schedules measured of each baseline family."""

EXPLORE = 4
"""One candidate in so many is drawn by chance, and one is sought away from the target."""

PARENTS = 12
"""Points of the front whose neighbours are looked at."""

TOLERANCE = 1.3
"""Candidates this far above the front are still measured whole: damage and top-1 can disagree."""

SMALLEST, RIDGE = 1e-6, 0.05
"""Damage below which differences mean nothing, and the penalty of the regression on it."""

FINALISTS, BUDGET_FINALISTS = 40, 6
"""Most free lists that are measured on the validation images for an accuracy target, and for a cost
target, which takes a third as many of each baseline family."""

EVERYWHERE = (0.0, float("inf"))
"""The window of all costs."""


@dataclass(frozen=True)
class Score:
    """How a schedule does on some images.

    Attributes:
        total: Sum over the images of what is counted of each, at most 1: how many are right, or
            the sum of their similarities.
        damage: Mean damage of an image, see ``measure.Measure``.
        worst: Largest damage of an image.
        difference: Mean absolute difference from the unmerged model's maps; None if no maps.
        complete: Whether no image was left out, as they are once the damage is beyond a bound.
        entropy: Least token-size entropy of any image, 0 to 1.
    """

    images: int
    total: float
    damage: float
    worst: float = 0.0
    difference: float | None = None
    complete: bool = True
    entropy: float = 1.0

    def joined(self, other: Score) -> Score:
        """The score on these images and on others, of which this one has the entropy."""
        images = self.images + other.images
        share = self.images / images
        difference = None
        if self.difference is not None and other.difference is not None:
            difference = share * self.difference + (1 - share) * other.difference
        return replace(
            self,
            images=images,
            total=self.total + other.total,
            damage=(self.damage * self.images + other.damage * other.images) / images,
            worst=max(self.worst, other.worst),
            difference=difference,
        )


@dataclass(frozen=True)
class ScoredSchedule:
    """A measured schedule: what proposed it, its MACs or predicted milliseconds, its score."""

    r: Rs
    method: Method
    cost: float
    score: Score


def pareto(points: Sequence[ScoredSchedule]) -> list[ScoredSchedule]:
    """Complete points that no other beats in both cost and damage, cheapest first."""
    front: list[ScoredSchedule] = []
    for point in sorted(points, key=lambda point: (point.cost, point.score.damage, point.r)):
        best = front[-1].score.damage if front else np.inf
        if point.score.complete and point.score.damage < best:
            front.append(point)
    return front


def predicted_log_damage(
    candidates: ScheduleTable,
    r: ScheduleTable,
    damage: NDArray[np.float64],
    weight: NDArray[np.float64],
    tokens: int,
) -> NDArray[np.float64]:
    """Guess the log damage ``[C]`` of ``candidates [C, L]``, to rank them.

    It is a ridge regression on r and its square, in shares of the model's tokens, of the ``damage
    [P]`` of measured schedules ``r [P, L]``, each of which counts by its ``weight [P]``.
    """
    measured, wanted = (
        np.concatenate([x, x**2], axis=1) for x in (r / tokens, candidates / tokens)
    )
    target, total = _log(damage), weight.sum()
    mean, offset = weight @ measured / total, weight @ target / total
    scale = np.sqrt(weight @ (measured - mean) ** 2 / total) + 1e-12
    centred = (measured - mean) / scale * np.sqrt(weight)[:, None]
    gram = centred.T @ centred + RIDGE * np.eye(centred.shape[1])
    slope = np.linalg.solve(gram, centred.T @ ((target - offset) * np.sqrt(weight)))
    return np.asarray(offset + (wanted - mean) / scale @ slope)


def _log(damage: NDArray[np.float64]) -> NDArray[np.float64]:
    """The scale on which damage is modelled and compared."""
    return np.asarray(np.log(damage + SMALLEST))


@dataclass
class Search:
    """Points measured so far, and how to find more.

    Deterministic for a seed, unless the deadline ends it.

    Attributes:
        evaluate: Measures a schedule on the search images, or stops early once the mean damage is
            sure to be above a bound.
        budget: Most cost allowed; None with ``needed``.
        needed: Least total of the search images; None with ``budget``.
        min_entropy: Least token-size entropy of any search image; schedules with less are measured,
            and then neither beat others nor have neighbours.
        deadline: Seconds of ``time.monotonic``; nothing new is measured after it.
        on_progress: Called with what is measured, how many were, and how many there are to be.
        cut_short: Whether the deadline ended it.
    """

    space: SearchSpace
    cost: Cost
    evaluate: Callable[[Rs, float], Score]
    budget: float | None = None
    needed: float | None = None
    seed: int = 0
    min_entropy: float = 0.0
    deadline: float = float("inf")
    on_progress: Callable[[str, int, int], None] = lambda *_: None
    points: dict[Rs, ScoredSchedule] = field(default_factory=dict, init=False)
    cut_short: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        self._random = np.random.default_rng(self.seed)

    def considered(self) -> list[ScoredSchedule]:
        """The points that do not merge more than is allowed."""
        return [p for p in self.points.values() if p.score.entropy >= self.min_entropy]

    def measure(self, r: Rs, method: Method, bound: float = float("inf")) -> None:
        """Measure a schedule, unless it is known already."""
        if r not in self.points:
            cost = float(self.cost(table_of([r]))[0])
            self.points[r] = ScoredSchedule(r, method, cost, self.evaluate(r, bound))

    def baselines(self, share: float = 1.0) -> None:
        """Measure ToMe's families, each spread evenly over its costs.

        No more are begun after ``share`` of the time up to the deadline; called again, it goes on.
        """
        families = {m: _spread(self.space.baselines(m), most) for m, most in BASELINES.items()}
        # What a budget is compared with comes first, then every fourth, for when time is short.
        picked = [(method, r) for method in families if (r := self.dearest(method)) is not None]
        picked += [
            (method, r)
            for offset in range(4)
            for method, schedules in families.items()
            for r in schedules[offset::4]
        ]
        now = time.monotonic()
        until = now + share * (self.deadline - now)
        for done, (method, r) in enumerate(picked, 1):
            if self._late() or time.monotonic() > until:
                return
            self.measure(r, method)
            self.on_progress("baselines", done, len(picked))
        self._best_constant()

    def _best_constant(self) -> None:
        """Measure the constant r between the cheapest that is good and the next, which is not.

        A family is spread, and a free list is to be compared with the best r there is.
        """
        constant, good = self.space.baselines("constant"), {point.r for point in self._good()}
        known = [index for index, r in enumerate(constant) if r in self.points]
        best = max((index for index in known if constant[index] in good), default=len(constant))
        for r in constant[best + 1 : min((i for i in known if i > best), default=0)]:
            if self._late():
                return
            self.measure(r, "constant")

    def dearest(self, method: Method) -> Rs | None:
        """The baseline of a family that costs most within the budget; None if none is."""
        if self.budget is None:
            return None
        family = self.space.baselines(method)
        costs = zip(self.cost(table_of(family)).tolist(), family, strict=True)
        return max(((cost, r) for cost, r in costs if cost <= self.budget), default=(0, None))[1]

    def free(self, count: int) -> None:
        """Measure up to ``count`` free lists; there must be baselines to start from."""
        for step in range(count):
            r = None if self._late() else self._next(step)
            if r is None:
                return
            bound = float(np.exp(self._front_damage(self.cost(table_of([r])))[0])) * TOLERANCE
            self.measure(r, "free", bound)
            self.on_progress("free", step + 1, count)

    def _late(self) -> bool:
        self.cut_short = self.cut_short or time.monotonic() >= self.deadline
        return self.cut_short

    def _front_damage(self, costs: NDArray[np.float64]) -> NDArray[np.float64]:
        """Log damage that the front does at costs, which a candidate there has to beat.

        Interpolated on the scale of both logarithms; outside the front it is that of its ends.
        """
        front = pareto(self.considered())
        known, damage = np.array([(point.cost, point.score.damage) for point in front]).T
        return np.asarray(np.interp(np.log(costs), np.log(known), _log(damage)))

    def _next(self, step: int) -> Rs | None:
        """The unmeasured neighbour of the front that promises most; None if there is none."""
        window = EVERYWHERE if step % EXPLORE == EXPLORE - 1 else self._window()
        pool, costs = self._pool(window)
        if not len(pool) and window != EVERYWHERE:
            window = EVERYWHERE
            pool, costs = self._pool(window)
        if not len(pool):
            return None
        gain = self._front_damage(costs) - self._predicted(pool, window)
        order = np.lexsort((*pool.T, -gain))
        chance = step % EXPLORE == 1
        chosen = int(self._random.integers(min(10, len(order)))) if chance else 0
        return rs_of(pool[order[chosen]])

    def _window(self) -> tuple[float, float]:
        if self.budget is not None:
            return 0.93 * self.budget, self.budget
        good = self._good()
        if not good:
            most = max(point.cost for point in self.considered())
            return 0.9 * most, float("inf")
        least = min(point.cost for point in good)
        return 0.8 * least, 1.05 * least

    def _good(self) -> list[ScoredSchedule]:
        """The points with as high a total as is needed; none of them with a budget."""
        if self.needed is None:
            return []
        return [p for p in self.considered() if p.score.total >= self.needed]

    def _pool(self, window: tuple[float, float]) -> tuple[ScheduleTable, NDArray[np.float64]]:
        """Unmeasured neighbours, with a cost inside the window, of the points nearest to it."""
        low, high = window
        good = sorted(self._good(), key=lambda p: (p.cost, p.r))[: PARENTS // 3]
        front = [*good, *pareto(self.considered())]
        if np.isfinite(high) and high > 0:
            centre = np.log((low * high) ** 0.5)
            parents = sorted(front, key=lambda p: (abs(np.log(p.cost) - centre), p.r))[:PARENTS]
        else:
            picked = self._random.permutation(len(front))[:PARENTS]
            parents = [front[index] for index in sorted(picked)]
        found = np.concatenate([self.space.neighbours(point.r) for point in parents])
        found = np.unique(found, axis=0)
        found = found[[rs_of(row) not in self.points for row in found]]
        costs = self.cost(found) if len(found) else np.empty(0)
        inside = (costs >= low) & (costs <= high) & found.any(axis=1)
        return found[inside], costs[inside]

    def _predicted(self, pool: ScheduleTable, window: tuple[float, float]) -> NDArray[np.float64]:
        """Predicted log damage, from all points, those near the window counting most."""
        points = list(self.points.values())
        costs = np.array([point.cost for point in points])
        weight = np.ones(len(points))
        if np.isfinite(window[1]):
            away = np.maximum(np.log(costs / window[1]), np.log(window[0] / costs))
            weight = np.exp(-2 * np.maximum(away, 0)) + 0.02
        damage = np.array([point.score.damage for point in points])
        measured = table_of([point.r for point in points])
        return predicted_log_damage(pool, measured, damage, weight, self.space.tokens)


def _spread(schedules: Sequence[Rs], count: int) -> list[Rs]:
    """At most ``count`` of a family, evenly and in order, first and last among them."""
    if len(schedules) <= count:
        return list(schedules)
    index = np.unique(np.linspace(0, len(schedules) - 1, count).round().astype(int))
    return [schedules[i] for i in index]


@dataclass
class Finalists:
    """Points that are measured on the validation images, each once, and the choice among them.

    Attributes:
        validate: Measures a schedule on the validation images; None if there are none.
        out_of_time: Whether to measure no more than is needed for any choice.
        measured: The points that were measured, with their score on search and validation images.
    """

    validate: Callable[[Rs], Score] | None
    out_of_time: Callable[[], bool] = lambda: False
    measured: dict[Rs, ScoredSchedule] = field(default_factory=dict, init=False)

    def measure(self, point: ScoredSchedule) -> ScoredSchedule:
        """The point with its score on both parts."""
        if point.r not in self.measured:
            score = point.score
            if self.validate is not None:
                score = score.joined(self.validate(point.r))
            self.measured[point.r] = replace(point, score=score)
        return self.measured[point.r]

    def cheapest(
        self, points: Iterable[ScoredSchedule], needed: float, validation_images: int
    ) -> ScoredSchedule | None:
        """The cheapest point with a high enough total of the search and validation images.

        Out of time, the cheapest that met the target so far is taken. If none did, one is still
        measured: the one that does best on the search images. None if no point meets the target.
        """
        # Less than this on the search images cannot be made good by the others, at most 1 each.
        hopeful = [
            p for p in points if p.score.complete and p.score.total + validation_images >= needed
        ]
        hopeful.sort(key=lambda p: (p.cost, p.score.damage, p.r))
        best: ScoredSchedule | None = None
        # The baselines first: there are few, and no free list need be as dear as the best of them.
        for point in (*(p for p in hopeful if p.method in BASELINES), *_free(hopeful)):
            if best is not None and point.cost >= best.cost:
                continue
            late = self.out_of_time()
            if late and best is not None:
                return best
            found = self.measure(best_of(hopeful) if late else point)
            if found.score.total >= needed:
                best = found
            if late:
                break
        return best

    def best_within(self, points: Iterable[ScoredSchedule], budget: float) -> ScoredSchedule | None:
        """The point within a budget with the highest total of all; then the least damage.

        Out of time, only one is measured. None if no point is within the budget.
        """
        within = [point for point in points if point.score.complete and point.cost <= budget]
        within.sort(key=lambda point: (point.score.damage, point.cost, point.r))
        picked = within[:BUDGET_FINALISTS]
        for method in BASELINES:
            picked += [p for p in within if p.method == method][: BUDGET_FINALISTS // 3]
        found: list[ScoredSchedule] = []
        for point in picked:
            if self.out_of_time() and found:
                break
            found.append(self.measure(point))
        return min(found, key=lambda p: (-p.score.total, p.score.damage, p.cost), default=None)

    def front(self, points: Sequence[ScoredSchedule]) -> list[ScoredSchedule]:
        """Each family's and the free lists' own front, and what was measured, cheapest first."""
        picked = dict(self.measured)
        for method in (*BASELINES, "free"):
            picked |= {p.r: p for p in pareto([p for p in points if p.method == method])}
        shown = sorted(picked.values(), key=lambda p: (p.cost, p.r))
        # Every fourth first: if time runs out, the picture is coarse and not cut off.
        for point in (point for offset in range(4) for point in shown[offset::4]):
            if self.out_of_time():
                break
            self.measure(point)
        return [self.measured[point.r] for point in shown if point.r in self.measured]


def best_of(points: Iterable[ScoredSchedule]) -> ScoredSchedule:
    """The point that does best on the search images."""
    return max(points, key=lambda p: (p.score.total, -p.score.damage, p.r))


def _free(points: Sequence[ScoredSchedule]) -> list[ScoredSchedule]:
    """Free lists that no cheaper one beats in total and damage; the points are by cost."""
    kept: list[ScoredSchedule] = []
    for point in points:
        beaten = any(
            other.score.total >= point.score.total and other.score.damage <= point.score.damage
            for other in kept
        )
        if point.method == "free" and not beaten:
            kept.append(point)
    return kept[:FINALISTS]
