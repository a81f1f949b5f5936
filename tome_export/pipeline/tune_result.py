"""What a search writes: the content of ``schedule.json``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from tome_export.evaluation.metrics import CONFIDENCE, paired_difference, wilson
from tome_export.tune.choose import Finalist
from tome_export.tune.front import Score
from tome_export.tune.schedule_file import FORMAT
from tome_export.tune.space import Rs, Space, table_of

if TYPE_CHECKING:
    from tome_export.models import WeightsInfo
    from tome_export.pipeline.tune_images import TuneImages
    from tome_export.pipeline.tune_score import Scorer
    from tome_export.tune.goal import Goal
    from tome_export.tune.table import CostTable

Latency = Callable[[Rs], float | None]


def values_of(
    *,
    model: str,
    goal: Goal,
    images: TuneImages,
    scorer: Scorer,
    space: Space,
    chosen: Finalist,
    constant: Finalist | None,
    front: Sequence[Finalist],
    latency: Latency,
    measured_ms: float | None,
    unmerged_ms: float | None,
    table: CostTable | None,
    looks: int,
    searched: int,
    ended_by_time: bool,
    weights: WeightsInfo,
    batch: int,
    precision: str,
    seconds: float,
) -> dict[str, Any]:
    """The content of the schedule file.

    Args:
        model: The recipe's name.
        goal: What was asked for.
        images: What was measured on.
        scorer: Knows the unmerged model's results.
        space: For MACs.
        chosen: The schedule found.
        constant: The best constant r for the same target; None if none meets it.
        front: What the picture shows.
        latency: Predicted, in ms.
        measured_ms: Of the chosen schedule.
        unmerged_ms: Of the unmerged model, measured along with it.
        table: The cost table, if latency was asked for.
        looks: Finalists that were measured on the validation images in order to choose.
        searched: Schedules that were measured on the search images.
        ended_by_time: Whether the time limit ended the search.
        weights: Those of the model.
        batch: Images per run.
        precision: Of the model whose latency is measured.
        seconds: That all this took.
    """
    from tome_export.bench.environment import environment

    right = scorer.unmerged_right
    difference = paired_difference(scorer.right(chosen.point.r), right)
    unmerged: Rs = (0,) * space.depth

    def entry(finalist: Finalist) -> dict[str, Any]:
        return _entry(finalist, space, latency, chosen)

    return {
        "format": FORMAT,
        "model": model,
        "weights": {"kind": weights.kind, "source": weights.source},
        "schedule": list(chosen.point.r),
        "objective": {
            "kind": goal.kind,
            "value": goal.value,
            "relative": goal.relative,
            "metric": images.metric,
            "text": str(goal),
        },
        "found": {
            **entry(chosen),
            "latency_ms": measured_ms,
            "predicted_latency_ms": latency(chosen.point.r),
            "search_accuracy": _share(chosen.point.score),
            "validation_accuracy": _share(chosen.validation) if chosen.validation else None,
            "against_unmerged": difference.to_dict(),
        },
        "best_constant": entry(constant) if constant else None,
        "unmerged": {
            "macs": int(space.macs(table_of([unmerged]))[0]),
            "latency_ms": unmerged_ms,
            "predicted_latency_ms": latency(unmerged),
            **_accuracy(int(right.sum()), len(right)),
            "search_accuracy": float(np.mean(right[: images.search])),
        },
        "front": [entry(finalist) for finalist in front],
        "cost_table": {**table.to_dict(), "batch": batch, "precision": precision} if table else {},
        "images": len(right),
        "data": {
            "source": images.source,
            "available": images.available,
            "search": images.search,
            "validation": len(right) - images.search,
            "unreadable_count": images.unreadable,
            "notes": list(images.notes),
        },
        "search": {
            "schedules": searched,
            "validation_looks": looks if chosen.validation else 0,
            "ended_by_time_limit": ended_by_time,
        },
        "confidence": CONFIDENCE,
        "seconds": seconds,
        "environment": environment(),
    }


def _entry(finalist: Finalist, space: Space, latency: Latency, chosen: Finalist) -> dict[str, Any]:
    point = finalist.point
    return {
        "schedule": list(point.r),
        "method": point.method,
        "macs": int(space.macs(table_of([point.r]))[0]),
        "latency_ms": latency(point.r),
        **_accuracy(finalist.correct, finalist.images),
        "damage": finalist.damage,
        "chosen": point.r == chosen.point.r,
    }


def _accuracy(correct: int, images: int) -> dict[str, Any]:
    low, high = wilson(correct, images)
    return {"accuracy": correct / images, "correct": correct, "low": low, "high": high}


def _share(score: Score) -> float:
    return score.correct / score.images
