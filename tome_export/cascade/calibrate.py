"""From what every member says of the calibration images to the setting that meets a target.

Candidates are thresholds between which images of the calibration change sides. On known answers
each is run as the served model runs it; kept are those that no other beats.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tome_export.artifact.cascade import (
    ComplexityPolicy,
    ConfidenceMeasure,
    ConfidencePolicy,
    LearnedPolicy,
    Policy,
)
from tome_export.cascade import policy
from tome_export.errors import InputError

MOST = 3000
"""Most settings that are tried, of all thresholds together."""

MOST_PRICES = 250
"""Most prices that are tried of one head."""

NEVER, ALWAYS = 0.0, 2.0
"""Thresholds of a confidence that no image, or every one, is under: it lies between 0 and 1."""

STEPS, RATE, DECAY = 300, 0.05, 1e-2
"""Of a head's training: steps of AdamW on all images at once, learning rate and weight decay."""


@dataclass(frozen=True)
class Costs:
    """Multiply-accumulates per image.

    Attributes:
        members: Of each member, ascending.
        policy: Of the policy itself.
    """

    members: tuple[int, ...]
    policy: int

    @property
    def shares(self) -> tuple[float, ...]:
        """MACs of each member over the largest's."""
        return tuple(count / self.members[-1] for count in self.members)

    def check_budget(self, budget: float, least: float, asked: str) -> None:
        """Raise ``InputError`` unless a mean of so many MACs needs a cascade, and one can have it.

        Args:
            budget: Most mean MACs per image.
            least: The least mean that there can be.
            asked: The target, for the message.
        """
        most = self.members[-1]
        if not least <= budget < most:
            raise InputError(
                f"target is {asked}; these artifacts span {least / 1e6:.2f} M (the lowest for "
                f"every image) to {most / 1e6:.2f} M MACs (the highest alone, without a cascade), "
                "ask for a mean in between"
            )


@dataclass(frozen=True)
class Observations:
    """What every member says of every image, and what the policies look at.

    Attributes:
        classes: Best class by each member ``[M, B]`` int64; -1 where its output is not finite.
        confidence: Of each member ``[M, B]`` float64, by the measure of the policy.
        surprise: What each member's probability of the truth is short of 1, in nats: the cross-
            entropy ``[M, B]`` float64.
        complexity: ``[B]`` float64.
        patches: Average patches ``[B, P]`` float64; P is 0 where no policy needs them.
        truth: The class that counts as right ``[B]`` int64: the label, or what the largest
            member says.
    """

    classes: NDArray[np.int64]
    confidence: NDArray[np.float64]
    surprise: NDArray[np.float64]
    complexity: NDArray[np.float64]
    patches: NDArray[np.float64]
    truth: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.truth)

    @property
    def right(self) -> NDArray[np.bool_]:
        """Whether each member is right ``[M, B]``; an output that is not finite never is."""
        same: NDArray[np.bool_] = (self.classes == self.truth) & (self.classes >= 0)
        return same

    def take(self, rows: NDArray[np.int64]) -> Observations:
        """The same of some images."""
        return Observations(
            self.classes[:, rows],
            self.confidence[:, rows],
            self.surprise[:, rows],
            self.complexity[rows],
            self.patches[rows],
            self.truth[rows],
        )


@dataclass(frozen=True)
class Outcome:
    """What became of each image.

    Attributes:
        budget: The member whose answer it got ``[B]`` int64.
        macs: What it cost ``[B]`` int64: the policy, and every member that was run for it.
        right: Whether the answer is right ``[B]``.
        surprise: Of the answer, see ``Observations`` ``[B]``.
    """

    budget: NDArray[np.int64]
    macs: NDArray[np.int64]
    right: NDArray[np.bool_]
    surprise: NDArray[np.float64]


def outcome(setting: Policy, seen: Observations, costs: Costs) -> Outcome:
    """Run a policy on known answers, as the served model does."""
    each = np.asarray(costs.members, np.int64)
    if isinstance(setting, ConfidencePolicy):
        budget = np.zeros(len(seen), np.int64)
        for member, threshold in enumerate(setting.thresholds):
            unsure = policy.is_unsure(seen.confidence[member], threshold)
            budget[(budget == member) & unsure] = member + 1
        cost = np.cumsum(each)[budget]
    elif isinstance(setting, ComplexityPolicy):
        budget = policy.by_thresholds(seen.complexity, setting.thresholds)
        cost = each[budget]
    else:
        scores = policy.head_scores(seen.patches, setting.weights, setting.bias)
        budget = policy.by_price(scores, setting.shares, setting.price)
        cost = each[budget]
    image = np.arange(len(seen))
    right, surprise = seen.right[budget, image], seen.surprise[budget, image]
    return Outcome(budget, cost + costs.policy, right, surprise)


def complexity_settings(seen: Observations) -> list[ComplexityPolicy]:
    """Ascending thresholds on the score, one fewer than there are members."""
    count = len(seen.classes) - 1
    low, high = float(seen.complexity.min()) - 1.0, float(seen.complexity.max()) + 1.0
    cuts = {low, *_cuts(seen.complexity, _levels(count)), high}
    found = itertools.combinations_with_replacement(sorted(cuts), count)
    return [ComplexityPolicy(thresholds=one) for one in found]


def confidence_settings(seen: Observations, measure: ConfidenceMeasure) -> list[ConfidencePolicy]:
    """One threshold for each member but the last, each on its own.

    They lie denser among the images that a member is least sure of, where thresholds of use are.
    """
    count = len(seen.classes) - 1
    each = [
        sorted({NEVER, *_cuts(known, _levels(count), power=2), ALWAYS})
        for known in seen.confidence[:-1]
    ]
    found = itertools.product(*each)
    return [ConfidencePolicy(measure=measure, thresholds=one) for one in found]


def learned_settings(seen: Observations, head: LearnedPolicy) -> Iterator[LearnedPolicy]:
    """Prices at which images of the calibration change from one member to another.

    Args:
        seen: With average patches.
        head: Of any price.
    """
    scores, shares = policy.head_scores(seen.patches, head.weights, head.bias), head.shares
    turns = np.concatenate(
        [
            (scores[:, j] - scores[:, i]) / (shares[j] - shares[i])
            for i, j in itertools.combinations(range(len(shares)), 2)
        ]
    )
    spread = float(np.abs(turns).max()) + 1.0
    for price in [-spread, *_cuts(turns, MOST_PRICES), spread]:
        yield head.model_copy(update={"price": price})


def _levels(thresholds: int) -> int:
    """Levels of each of so many thresholds, for ``MOST`` settings in all."""
    return max(2, int(MOST ** (1 / thresholds)) - 2)


def _cuts(values: NDArray[np.float64], most: int, power: float = 1) -> list[float]:
    """Midpoints between neighbouring values, at most so many, evenly by rank where power is 1."""
    known = np.unique(values[np.isfinite(values)])
    middles = (known[1:] + known[:-1]) / 2
    if len(middles) <= most:
        return [float(value) for value in middles]
    ranks = np.unique(np.rint((len(middles) - 1) * np.linspace(0, 1, most) ** power).astype(int))
    return [float(middles[rank]) for rank in ranks]


def trained_head(
    seen: Observations,
    embedding: tuple[NDArray[np.float64], NDArray[np.float64]],
    shares: Sequence[float],
    target: float,
    strength: float,
) -> LearnedPolicy:
    """Train a linear head on the pooled patch embedding, and fold the embedding into it.

    The class of an image is the cheapest member that is right about it; the lowest one where none
    is. The loss is cross-entropy plus ``strength * (actual - target)^2``, where actual is the mean
    over the images of the share of MACs that the head's probabilities expect.

    Args:
        seen: Images to train on, with average patches ``[B, P]``.
        embedding: Weights ``[D, C, h, w]`` and bias ``[D]`` of the patch embedding.
        shares: MACs of each member over the largest's.
        target: Mean share to aim at.
        strength: Of the second term (lambda).

    Returns:
        A policy on the average patch, at a price of 0. Nothing is drawn at random.
    """
    import torch
    from torch.nn import functional

    kernels, offset = embedding[0].reshape(len(embedding[0]), -1), embedding[1]
    pooled = seen.patches @ kernels.T + offset
    mean, std = pooled.mean(axis=0), pooled.std(axis=0) + 1e-6
    x = torch.from_numpy((pooled - mean) / std)
    y = torch.from_numpy(np.where(seen.right.any(axis=0), seen.right.argmax(axis=0), 0))
    cost = torch.tensor(list(shares), dtype=torch.float64)
    weight = torch.zeros(len(cost), x.shape[1], dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(len(cost), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.AdamW([weight, bias], lr=RATE, weight_decay=DECAY)
    for _ in range(STEPS):
        scores = functional.linear(x, weight, bias)
        actual = (scores.softmax(dim=1) @ cost).mean()
        loss = functional.cross_entropy(scores, y) + strength * (actual - target) ** 2
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    head, constant = weight.detach().numpy() / std, bias.detach().numpy()
    height, width = embedding[0].shape[2:]
    return LearnedPolicy(
        weights=(head @ kernels).tolist(),
        bias=(constant + head @ (offset - mean)).tolist(),
        shares=tuple(shares),
        price=0.0,
        patch=(height, width),
    )


@dataclass(frozen=True)
class CalibratedSetting:
    """A setting on the calibration images.

    Attributes:
        policy: With its thresholds.
        macs: Mean cost of an image.
        correct: Images that are right.
        surprise: Mean cross-entropy of the answers, in nats.
    """

    policy: Policy
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
    settings: Iterable[Policy], seen: Observations, costs: Costs
) -> list[CalibratedSetting]:
    """The settings that no other beats in both mean cost and rank, cheapest first.

    Args:
        settings: To try; at least one.
        seen: The calibration images.
        costs: Of the members and the policy.
    """
    points = []
    for setting in settings:
        found = outcome(setting, seen, costs)
        cost, surprise = float(found.macs.mean()), float(found.surprise.mean())
        points.append(CalibratedSetting(setting, cost, int(found.right.sum()), surprise))
    front: list[CalibratedSetting] = []
    for point in sorted(points, key=lambda p: (p.macs, -p.correct, p.surprise)):
        if not front or point.rank > front[-1].rank:
            front.append(point)
    return front


def cheapest(
    front: Sequence[CalibratedSetting], needed: int, images: int, asked: str
) -> CalibratedSetting:
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


def best_within(
    front: Sequence[CalibratedSetting], budget: float, costs: Costs, asked: str
) -> CalibratedSetting:
    """The setting of the best rank whose mean cost is within a budget.

    Raises:
        InputError: if the members span no such cost.
    """
    costs.check_budget(budget, front[0].macs, asked)
    return [point for point in front if point.macs <= budget][-1]
