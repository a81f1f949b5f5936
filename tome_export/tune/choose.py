"""From the points of a search to the one schedule that is written.

The search sees its own images only. Finalists are measured on validation images too, and the
target must hold on both together. The validation images are thereby used to accept or reject
finalists and for nothing else; how many were looked at is reported, because the more there are, the
more the validation accuracy of the one that is chosen flatters. So neither part can say how good
the choice is: where there are enough images, a third part is held out that nothing here looks at,
and the interval that is reported comes from it alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

from tome_export.tune.search import BASELINES, Score, ScoredSchedule, pareto
from tome_export.tune.space import Rs

FINALISTS, BUDGET_FINALISTS = 40, 6
"""Most free lists that are measured on the validation images for an accuracy target, and for a cost
target, which takes a third as many of each baseline family."""


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
            parts = [point.score, *([self.validate(point.r)] if self.validate else [])]
            images = sum(part.images for part in parts)
            score = replace(
                point.score,
                images=images,
                correct=sum(part.correct for part in parts),
                damage=sum(part.damage * part.images for part in parts) / images,
            )
            self.measured[point.r] = replace(point, score=score)
        return self.measured[point.r]

    def cheapest(
        self, points: Iterable[ScoredSchedule], needed: int, validation_images: int
    ) -> ScoredSchedule | None:
        """The cheapest point with enough images right, of those of search and validation.

        Out of time, the cheapest that met the target so far is taken. If none did, one is still
        measured: the one that does best on the search images. None if no point meets the target.
        """
        # Fewer right than this on the search images cannot be made good by the others.
        hopeful = [
            p for p in points if p.score.complete and p.score.correct + validation_images >= needed
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
            found = self.measure(most_right(hopeful) if late else point)
            if found.score.correct >= needed:
                best = found
            if late:
                break
        return best

    def best_within(self, points: Iterable[ScoredSchedule], budget: float) -> ScoredSchedule | None:
        """The point within a budget with the most images right of all; then the least damage.

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
        return min(found, key=lambda p: (-p.score.correct, p.score.damage, p.cost), default=None)

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


def most_right(points: Iterable[ScoredSchedule]) -> ScoredSchedule:
    """The point that does best on the search images."""
    return max(points, key=lambda p: (p.score.correct, -p.score.damage, p.r))


def _free(points: Sequence[ScoredSchedule]) -> list[ScoredSchedule]:
    """Of points by cost, free lists than which none is as cheap, as right and as little damaged."""
    kept: list[ScoredSchedule] = []
    for point in points:
        beaten = any(
            other.score.correct >= point.score.correct and other.score.damage <= point.score.damage
            for other in kept
        )
        if point.method == "free" and not beaten:
            kept.append(point)
    return kept[:FINALISTS]
