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
from dataclasses import dataclass, field

from tome_export.tune.search import BASELINES, Score, ScoredSchedule, pareto
from tome_export.tune.space import Rs

FINALISTS = 40
"""Most free lists that are measured on the validation images for an accuracy target."""

BUDGET_FINALISTS = 6
"""Most free lists, and of each baseline family a third of it, for a cost target."""


@dataclass(frozen=True)
class Finalist:
    """A point that was measured on the images that the choice is made on: search and validation.

    Attributes:
        point: With its score on the search images.
        validation: Score on the validation images; None if there are none.
    """

    point: ScoredSchedule
    validation: Score | None

    @property
    def correct(self) -> int:
        """Images that are right, of both parts."""
        return self.point.score.correct + (self.validation.correct if self.validation else 0)

    @property
    def images(self) -> int:
        """Images of both parts."""
        return self.point.score.images + (self.validation.images if self.validation else 0)

    @property
    def damage(self) -> float:
        """Mean damage in nats over both parts."""
        parts = [self.point.score, *([self.validation] if self.validation else [])]
        return sum(part.damage * part.images for part in parts) / self.images


@dataclass
class Finalists:
    """Points that are measured on the validation images, each once, and the choice among them.

    Attributes:
        validate: Measures a schedule on the validation images; None if there are none.
        out_of_time: Whether to measure no more than is needed for any choice.
        measured: Those that were measured.
    """

    validate: Callable[[Rs], Score] | None
    out_of_time: Callable[[], bool] = lambda: False
    measured: dict[Rs, Finalist] = field(default_factory=dict, init=False)

    def measure(self, point: ScoredSchedule) -> Finalist:
        """The point measured on both parts."""
        if point.r not in self.measured:
            validation = self.validate(point.r) if self.validate else None
            self.measured[point.r] = Finalist(point, validation)
        return self.measured[point.r]

    def cheapest(
        self, points: Iterable[ScoredSchedule], needed: int, validation_images: int
    ) -> Finalist | None:
        """The cheapest point with enough images right, of those of search and validation.

        Out of time, the cheapest that met the target so far is taken. If none did, one is still
        measured: the one that does best on the search images.

        Args:
            points: To choose from.
            needed: Images that must be right.
            validation_images: How many of them the search did not see.

        Returns:
            None if no point that was measured meets the target.
        """
        # Fewer right than this on the search images cannot be made good by the others.
        hopeful = [
            p for p in points if p.score.complete and p.score.correct + validation_images >= needed
        ]
        hopeful.sort(key=lambda p: (p.cost, p.score.damage, p.r))
        best: Finalist | None = None
        # The baselines first: there are few, and no free list need be as dear as the best of them.
        for group in ([p for p in hopeful if p.method in BASELINES], _free(hopeful)):
            for point in group:
                if best is not None and point.cost >= best.point.cost:
                    break
                if self.out_of_time():
                    return best or self._likeliest(hopeful, needed)
                if (found := self.measure(point)).correct >= needed:
                    best = found
                    break
        return best

    def _likeliest(self, points: Sequence[ScoredSchedule], needed: int) -> Finalist | None:
        best = max(points, key=lambda p: (p.score.correct, -p.score.damage, p.r))
        found = self.measure(best)
        return found if found.correct >= needed else None

    def best_within(self, points: Iterable[ScoredSchedule], budget: float) -> Finalist | None:
        """The point within a budget with the most images right of all; then the least damage.

        Out of time, only one is measured. None if no point is within the budget.
        """
        within = [point for point in points if point.score.complete and point.cost <= budget]
        within.sort(key=lambda point: (point.score.damage, point.cost, point.r))
        picked = within[:BUDGET_FINALISTS]
        for method in BASELINES:
            picked += [p for p in within if p.method == method][: BUDGET_FINALISTS // 3]
        found: list[Finalist] = []
        for point in picked:
            if self.out_of_time() and found:
                break
            found.append(self.measure(point))
        return min(found, key=lambda f: (-f.correct, f.damage, f.point.cost), default=None)

    def front(self, points: Iterable[ScoredSchedule]) -> list[Finalist]:
        """Each family's and the free lists' own front, and what was measured, cheapest first."""
        everything = list(points)
        picked = {r: finalist.point for r, finalist in self.measured.items()}
        for method in (*BASELINES, "free"):
            picked |= {p.r: p for p in pareto([p for p in everything if p.method == method])}
        shown = sorted(picked.values(), key=lambda p: (p.cost, p.r))
        # Every fourth first: if time runs out, the picture is coarse and not cut off.
        for offset in range(4):
            for point in shown[offset::4]:
                if self.out_of_time():
                    break
                self.measure(point)
        return [self.measured[point.r] for point in shown if point.r in self.measured]


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
