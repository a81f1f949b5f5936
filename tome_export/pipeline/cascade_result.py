"""The content of ``cascade.json``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from tome_export.artifact import Artifact
from tome_export.cascade.calibrate import Point
from tome_export.cascade.outcome import Observations, Outcome, outcome
from tome_export.evaluation.metrics import CONFIDENCE, METHODS, paired_difference, share_of
from tome_export.pipeline.cascade_images import Seen
from tome_export.pipeline.cascade_settings import Trial
from tome_export.tune.goal import Goal

if TYPE_CHECKING:
    from tome_export.pipeline.cascade import CascadeRequest

FORMAT = 1
"""Raised when a reader of the old form would misread the new."""


@dataclass(frozen=True)
class Found:
    """All that a calibration found.

    Attributes:
        members: By MACs ascending.
        macs: Of each.
        policy_macs: Of the policy itself.
        trial: What was tried, and on what images.
        test: Images that nothing was calibrated on.
        front: Settings that no other beats on the calibration images.
        chosen: Of them.
        seen: Of each source.
    """

    members: tuple[Artifact, ...]
    macs: Sequence[int]
    policy_macs: int
    trial: Trial
    test: Observations
    front: Sequence[Point]
    chosen: Point
    seen: tuple[Seen, ...]


def goal_text(goal: Goal) -> str:
    """A goal of a cascade in words: what is relative is so to the artifact of the most MACs."""
    if goal.relative and goal.kind == "target-macs":
        return f"a mean of at most {goal.value:g} % of the highest artifact's MACs"
    if goal.relative:
        return f"accuracy at most {-goal.value:g} points below the highest artifact"
    return str(goal)


def values_of(request: CascadeRequest, found: Found) -> dict[str, Any]:
    """JSON-ready numbers; shares come with their intervals."""
    from tome_export.bench.environment import environment

    highest = found.members[-1].manifest
    chosen = _run(found, found.chosen.settings)
    test_right = found.test.right
    members = [
        {
            "artifact": str(one.path),
            "schedule": one.manifest.merge.schedule,
            "r": list(one.manifest.merge.r),
            "precision": one.manifest.precision,
            "macs": count,
            "calibration": share_of(calibrated).model_dump(),
            "test": share_of(right).model_dump(),
        }
        for one, count, calibrated, right in zip(
            found.members, found.macs, found.trial.seen.right, test_right, strict=True
        )
    ]
    mean = float(chosen.macs.mean())
    goal = request.goal
    return {
        "format": FORMAT,
        "model": highest["model"]["name"],
        "random_weights": highest["model"]["random_weights"],
        "policy": request.policy,
        "metric": "top1" if found.seen[0].labelled else "agreement",
        "target": {"kind": goal.kind, "value": goal.value, "text": goal_text(goal)},
        "settings": dict(found.chosen.settings),
        "policy_macs": found.policy_macs,
        "members": members,
        "chosen": {
            "calibration": {
                "macs": found.chosen.macs,
                **_share(found.chosen.correct, len(found.trial.seen)),
            },
            "test": {
                "macs": mean,
                **share_of(chosen.right).model_dump(),
                "budgets": np.bincount(chosen.budget, minlength=len(members)).tolist(),
                "difference_to_highest": paired_difference(chosen.right, test_right[-1]).model_dump(),
                "met": _met(goal, chosen, found),
            },
        },
        "single": _single(members, mean, float(chosen.right.mean())),
        "sweep": [_swept(point, found) for point in found.front],
        "data": {
            "source": ", ".join(request.data),
            "test_source": ", ".join(request.test) or None,
            "fitted": found.trial.fitted,
            "calibration": len(found.trial.seen),
            "test": len(found.test),
            "seed": request.seed,
            "unreadable": [
                {"name": name, "reason": reason}
                for seen in found.seen
                for name, reason in seen.unreadable
            ],
        },
        "backend": request.backend,
        "confidence": CONFIDENCE,
        "methods": METHODS.model_dump(),
        "environment": environment().model_dump(),
    }


def _run(found: Found, settings: Any) -> Outcome:
    return outcome(settings, found.test, found.macs, found.policy_macs)


def _swept(point: Point, found: Found) -> dict[str, Any]:
    """A setting of the front on both parts; the front is chosen on calibration images alone."""
    one = _run(found, point.settings)
    names = ("thresholds", "price")
    return {
        **{name: point.settings[name] for name in names if name in point.settings},
        "calibration": {"macs": point.macs, **_share(point.correct, len(found.trial.seen))},
        "test": {"macs": float(one.macs.mean()), **_share(int(one.right.sum()), len(found.test))},
        "chosen": point is found.chosen,
    }


def _share(correct: int, images: int) -> dict[str, Any]:
    return {"correct": correct, "images": images, "share": correct / images}


def _met(goal: Goal, chosen: Outcome, found: Found) -> bool:
    """Whether the target holds on the test images, which it was not chosen for."""
    budget = goal.budget(found.macs[-1])
    if budget is not None:
        return bool(chosen.macs.mean() <= budget)
    needed = goal.needed(len(found.test), int(found.test.right[-1].sum()))
    return needed is not None and int(chosen.right.sum()) >= needed


def _single(members: Sequence[dict[str, Any]], macs: float, share: float) -> dict[str, Any] | None:
    """The cheapest member that is as accurate on the test images; None if none is."""
    able = next((one for one in members if one["test"]["share"] >= share), None)
    if able is None:
        return None
    return {
        "artifact": able["artifact"],
        "macs": able["macs"],
        "share": able["test"]["share"],
        "saved": 1 - macs / able["macs"],
    }
