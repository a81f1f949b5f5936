"""From thresholds that were tried on the calibration images to the setting that meets a target."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from tome_export.cascade.outcome import Observations, Settings, outcome
from tome_export.errors import InputError


@dataclass(frozen=True)
class Point:
    """A setting on the calibration images.

    Attributes:
        settings: The policy with its thresholds.
        macs: Mean cost of an image.
        correct: Images that are right.
        surprise: Mean cross-entropy of the answers, in nats.
    """

    settings: Settings
    macs: float
    correct: int
    surprise: float

    @property
    def rank(self) -> tuple[int, float]:
        """Greater is better: images right, then how probable the answers hold the truth.

        Once all calibration images are right, their number tells thresholds apart no more; the
        probabilities still do, so that a greater budget goes on being spent where it helps.
        """
        return self.correct, -self.surprise


def front_of(
    settings: Iterable[Settings], seen: Observations, macs: Sequence[int], policy_macs: int
) -> list[Point]:
    """The settings that no other beats in both mean cost and rank, cheapest first.

    Args:
        settings: To try; at least one.
        seen: The calibration images.
        macs: Of each member, ascending.
        policy_macs: Of the policy itself, per image.
    """
    points = []
    for one in settings:
        found = outcome(one, seen, macs, policy_macs)
        cost, surprise = float(found.macs.mean()), float(found.surprise.mean())
        points.append(Point(one, cost, int(found.right.sum()), surprise))
    front: list[Point] = []
    for point in sorted(points, key=lambda p: (p.macs, -p.correct, p.surprise)):
        if not front or point.rank > front[-1].rank:
            front.append(point)
    return front


def cheapest(front: Sequence[Point], needed: int, images: int, asked: str) -> Point:
    """The cheapest setting with enough images right.

    Args:
        front: From ``front_of``.
        needed: Images that must be right.
        images: Calibration images.
        asked: The target, for the message.

    Raises:
        InputError: if there is none; it says what can be reached.
    """
    found = next((point for point in front if point.correct >= needed), None)
    if found is None:
        best = next(point for point in front if point.correct == front[-1].correct)
        raise InputError(
            f"target is {asked}, {needed} of the {images} calibration images right; no thresholds "
            f"give more than {best.correct} ({100 * best.correct / images:.2f} %, at "
            f"{best.macs / 1e6:.2f} M MACs), ask for no more or add an artifact that merges less"
        )
    return found


def best_within(front: Sequence[Point], budget: float, macs: Sequence[int], asked: str) -> Point:
    """The setting of the best rank whose mean cost is within a budget.

    Args:
        front: From ``front_of``.
        budget: Most mean MACs per image.
        macs: Of each member, ascending.
        asked: The target, for the message.

    Raises:
        InputError: if the members span no such cost.
    """
    check_budget(budget, front[0].macs, macs[-1], asked)
    return [point for point in front if point.macs <= budget][-1]


def check_budget(budget: float, least: float, most: float, asked: str) -> None:
    """Refuse a mean cost that a cascade cannot have, or that needs none.

    Args:
        budget: Most mean MACs per image.
        least: What the lowest member for every image takes, with the policy.
        most: What the highest member alone takes.
        asked: The target, for the message.

    Raises:
        InputError: if it is not in between.
    """
    if not least <= budget < most:
        raise InputError(
            f"target is {asked}; these artifacts span {least / 1e6:.2f} M (the lowest for every "
            f"image) to {most / 1e6:.2f} M MACs (the highest alone, without a cascade), ask for a "
            "mean in between"
        )
