"""What a policy does on images whose every member's answer is known."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tome_export.cascade import policy

Settings = Mapping[str, Any]
"""A policy with its thresholds, as ``cascade.json`` and the served model have it."""


@dataclass(frozen=True)
class Observations:
    """What every member says of every image, and what the policies look at.

    Attributes:
        classes: Best class by each member ``[M, B]`` int64; -1 where its output is not finite.
        confidence: Of each member ``[M, B]`` float64, by the measure of the policy.
        surprise: What each member's probability of the truth is short of 1, in nats: the cross-
            entropy ``[M, B]`` float64.
        complexity: ``[B]`` float64.
        patches: Average patches ``[B, P]`` float64; None where no policy needs them.
        truth: The class that counts as right ``[B]`` int64: the label, or what the largest
            member says.
    """

    classes: NDArray[np.int64]
    confidence: NDArray[np.float64]
    surprise: NDArray[np.float64]
    complexity: NDArray[np.float64]
    patches: NDArray[np.float64] | None
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
        patches = None if self.patches is None else self.patches[rows]
        return Observations(
            self.classes[:, rows],
            self.confidence[:, rows],
            self.surprise[:, rows],
            self.complexity[rows],
            patches,
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


def outcome(
    settings: Settings, seen: Observations, macs: Sequence[int], policy_macs: int
) -> Outcome:
    """Run a policy on known answers, as the served model does.

    Args:
        settings: The policy.
        seen: The images.
        macs: Of each member, ascending.
        policy_macs: Of the policy itself, per image.
    """
    each = np.asarray(macs, np.int64)
    if settings["policy"] == "confidence":
        budget = np.zeros(len(seen), np.int64)
        for member, threshold in enumerate(settings["thresholds"]):
            unsure = policy.is_unsure(seen.confidence[member], threshold)
            budget[(budget == member) & unsure] = member + 1
        cost = np.cumsum(each)[budget]
    else:
        budget = _chosen(settings, seen)
        cost = each[budget]
    each_image = np.arange(len(seen))
    right, surprise = seen.right[budget, each_image], seen.surprise[budget, each_image]
    return Outcome(budget, cost + policy_macs, right, surprise)


def _chosen(settings: Settings, seen: Observations) -> NDArray[np.int64]:
    if settings["policy"] == "complexity":
        return policy.by_thresholds(seen.complexity, settings["thresholds"])
    if seen.patches is None:
        raise ValueError("average patches were not observed")
    scores = policy.head_scores(seen.patches, settings["weights"], settings["bias"])
    return policy.by_price(scores, settings["shares"], settings["price"])
