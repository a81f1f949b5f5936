"""From what every member says of the calibration images to the setting that meets a target.

Candidates are thresholds between which images of the calibration change sides. On known answers
each is run as the served model runs it; kept are those that no other beats.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tome_export.artifact.cascade import (
    CascadeScore,
    ComplexityPolicy,
    ConfidenceMeasure,
    ConfidencePolicy,
    LearnedPolicy,
    Policy,
)
from tome_export.cascade import policy
from tome_export.errors import InputError

MOST_SETTINGS, MOST_PRICES = 3000, 250
"""Most settings that are tried, of all thresholds together, and most prices of one head."""

NEVER, ALWAYS = 0.0, 2.0
"""Thresholds of a confidence that no image, or every one, is under: it lies between 0 and 1."""

STEPS, RATE, DECAY = 300, 0.05, 1e-2
"""Steps of AdamW on all images at once, learning rate and weight decay of a head's training."""


@dataclass(frozen=True)
class Costs:
    """Multiply-accumulates per image of each member, ascending, and of the policy itself."""

    members: tuple[int, ...]
    policy: int

    @property
    def shares(self) -> tuple[float, ...]:
        """MACs of each member over the largest's."""
        return tuple(count / self.members[-1] for count in self.members)

    def check_budget(self, budget: float, least: float, target: str) -> None:
        """Raise ``InputError`` unless a mean of so many MACs needs a cascade, and one can have it.

        The message says what ``least`` a mean can be, and the target in words.
        """
        most = self.members[-1]
        if not least <= budget < most:
            raise InputError(
                f"target is {target}; these artifacts span {least / 1e6:.2f} M (the lowest for "
                f"every image) to {most / 1e6:.2f} M MACs (the highest alone, without a cascade), "
                "ask for a mean in between"
            )


@dataclass(frozen=True)
class Observations:
    """What every member says of every image, and what the policies look at.

    Attributes:
        score: What counts of each member ``[B, M]``: bool, whether its class is the label, or what
            the largest member says; or of models without classes float64 from 0 to 1, how similar
            its output is to the largest member's. An output that is not finite counts nothing.
        surprise: Cross-entropy of each member's answer ``[B, M]`` float64, in nats; without classes
            one minus the score.
        confidence: Confidence of each member ``[B, M]`` float64, by the measure of the policy; NaN
            without classes.
        complexity: Complexity of the image ``[B]`` float64.
        patches: Average patches ``[B, P]`` float64; P is 0 where no policy needs them.
    """

    score: NDArray[Any]
    surprise: NDArray[np.float64]
    confidence: NDArray[np.float64]
    complexity: NDArray[np.float64]
    patches: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.score)

    def take(self, rows: NDArray[np.int64] | slice) -> Observations:
        """The observations of some images."""
        return Observations(*(array[rows] for array in vars(self).values()))

    @classmethod
    def joined(cls, parts: Sequence[Observations]) -> Observations:
        """The observations of all parts, in their order."""
        return cls(*map(np.concatenate, zip(*(vars(part).values() for part in parts), strict=True)))


@dataclass(frozen=True)
class Outcome:
    """What a policy makes of each image.

    Attributes:
        budget: The member whose answer it gets ``[B]`` int64.
        macs: What it costs ``[B]`` int64: the policy, and every member that is run for it.
        score: What counts of the answer ``[B]``, as in ``Observations``.
        surprise: Cross-entropy of the answer ``[B]``, in nats.
    """

    budget: NDArray[np.int64]
    macs: NDArray[np.int64]
    score: NDArray[Any]
    surprise: NDArray[np.float64]

    @property
    def mean(self) -> CascadeScore:
        """Mean cost, and the mean of what counts: how many are right."""
        correct = int(self.score.sum()) if self.score.dtype == np.bool_ else None
        return CascadeScore(
            macs=float(self.macs.mean()),
            correct=correct,
            images=len(self.score),
            share=float(self.score.mean()),
        )


def outcome(setting: Policy, observed: Observations, costs: Costs) -> Outcome:
    """Run a policy on known answers, as the served model does."""
    each = np.asarray(costs.members, np.int64)
    if isinstance(setting, ConfidencePolicy):
        budget = np.zeros(len(observed), np.int64)
        for member, threshold in enumerate(setting.thresholds):
            unsure = policy.is_unsure(observed.confidence[:, member], threshold)
            budget[(budget == member) & unsure] = member + 1
        each = np.cumsum(each)
    elif isinstance(setting, ComplexityPolicy):
        budget = policy.by_thresholds(observed.complexity, setting.thresholds)
    else:
        scores = policy.head_scores(observed.patches, setting.weights, setting.bias)
        budget = policy.by_price(scores, setting.shares, setting.price)
    image = np.arange(len(observed))
    score, surprise = observed.score[image, budget], observed.surprise[image, budget]
    return Outcome(budget, each[budget] + costs.policy, score, surprise)


def complexity_settings(observed: Observations) -> list[ComplexityPolicy]:
    """Ascending thresholds on the score, one fewer than there are members."""
    scores, count = observed.complexity, observed.score.shape[1] - 1
    ends = {float(scores.min()) - 1.0, float(scores.max()) + 1.0}
    cuts = sorted({*ends, *_cuts(scores, _levels(count))})
    found = itertools.combinations_with_replacement(cuts, count)
    return [ComplexityPolicy(thresholds=one) for one in found]


def confidence_settings(
    observed: Observations, measure: ConfidenceMeasure
) -> list[ConfidencePolicy]:
    """One threshold for each member but the last, each on its own.

    They lie denser among the images that a member is least sure of, where thresholds of use are.
    """
    known = observed.confidence[:, :-1].T
    each = [sorted({NEVER, *_cuts(one, _levels(len(known)), power=2), ALWAYS}) for one in known]
    return [ConfidencePolicy(measure=measure, thresholds=one) for one in itertools.product(*each)]


def learned_settings(observed: Observations, head: LearnedPolicy) -> Iterator[LearnedPolicy]:
    """The head at prices where images of the calibration change from one member to another."""
    scores, shares = policy.head_scores(observed.patches, head.weights, head.bias), head.shares
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
    """Levels of each of so many thresholds, for ``MOST_SETTINGS`` in all."""
    return max(2, int(MOST_SETTINGS ** (1 / thresholds)) - 2)


def _cuts(values: NDArray[np.float64], most: int, power: float = 1) -> list[float]:
    """Midpoints between neighbouring values, at most so many, evenly by rank where power is 1."""
    known = np.unique(values[np.isfinite(values)])
    middles = (known[1:] + known[:-1]) / 2
    if len(middles) > most:
        ranks = np.rint((len(middles) - 1) * np.linspace(0, 1, most) ** power)
        middles = middles[np.unique(ranks.astype(int))]
    return [float(value) for value in middles]


def trained_head(
    observed: Observations,
    embedding: tuple[NDArray[np.float64], NDArray[np.float64]],
    shares: Sequence[float],
    target: float,
    strength: float,
) -> LearnedPolicy:
    """Train a linear head on the pooled patch embedding, and fold the embedding into it.

    The class of an image is the cheapest member that is right about it; the lowest one where none
    is. Without classes it is the cheapest that is similar enough to the largest, and what is enough
    is the most for which these members meet the target in the mean.

    The loss is cross-entropy plus ``strength * (actual - target)^2``, where actual is the mean over
    the images of the share of MACs that the head's probabilities expect. The embedding is its
    weights ``[D, C, h, w]`` and bias ``[D]``; ``shares`` are MACs of members over the largest's.

    Returns:
        A policy on the average patch, at a price of 0. Nothing is drawn at random.
    """
    import torch
    from torch.nn import functional

    kernels, offset = embedding[0].reshape(len(embedding[0]), -1), embedding[1]
    pooled = observed.patches @ kernels.T + offset
    mean, std = pooled.mean(axis=0), pooled.std(axis=0) + 1e-6
    x = torch.from_numpy((pooled - mean) / std)
    y = torch.from_numpy(_cheapest_enough(observed.score, shares, target))
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


def _cheapest_enough(
    score: NDArray[Any], shares: Sequence[float], target: float
) -> NDArray[np.int64]:
    """The cheapest member ``[B]`` whose score ``[B, M]`` is enough; the lowest where none is."""
    levels = np.unique(score[score > 0].astype(np.float64))
    if len(levels) > MOST_PRICES:
        levels = levels[np.linspace(0, len(levels) - 1, MOST_PRICES).astype(int)]
    found = np.zeros(len(score), np.int64)
    for index, level in enumerate(levels):
        enough = score >= level
        member = np.where(enough.any(axis=1), enough.argmax(axis=1), 0)
        if index and np.asarray(shares)[member].mean() > target:
            break
        found = member
    return found


@dataclass(frozen=True)
class CalibratedSetting:
    """A policy with its thresholds on the calibration images: score and mean cross-entropy."""

    policy: Policy
    score: CascadeScore
    surprise: float

    @property
    def rank(self) -> tuple[float, float]:
        """Greater is better: share right, then how probable the answers hold the truth.

        Once all calibration images are right, their number tells thresholds apart no more; the
        probabilities still do, so that a greater budget goes on being spent where it helps.
        """
        return self.score.share, -self.surprise


def front_of(
    settings: Iterable[Policy], observed: Observations, costs: Costs
) -> list[CalibratedSetting]:
    """The settings that no other beats in both mean cost and rank, cheapest first."""
    points = []
    for setting in settings:
        found = outcome(setting, observed, costs)
        points.append(CalibratedSetting(setting, found.mean, float(found.surprise.mean())))
    front: list[CalibratedSetting] = []
    for point in sorted(points, key=lambda p: (p.score.macs, -p.score.share, p.surprise)):
        if not front or point.rank > front[-1].rank:
            front.append(point)
    return front


def cheapest(front: Sequence[CalibratedSetting], needed: float, target: str) -> CalibratedSetting:
    """The cheapest setting of a front with so many images right, or such a sum, as is needed."""
    found = next((point for point in front if point.score.total >= needed), None)
    if found is None:
        most = front[-1].score.total
        best = next(point.score for point in front if point.score.total == most)
        raise InputError(
            f"target is {target}, {needed} of the {best.images} calibration images right; no "
            f"thresholds give more than {best.correct} ({100 * best.share:.2f} %, at "
            f"{best.macs / 1e6:.2f} M MACs), ask for no more or add an artifact that merges less"
        )
    return found


def best_within(
    front: Sequence[CalibratedSetting], budget: float, costs: Costs, target: str
) -> CalibratedSetting:
    """The setting of the best rank whose mean cost is within a budget."""
    costs.check_budget(budget, front[0].score.macs, target)
    return [point for point in front if point.score.macs <= budget][-1]
