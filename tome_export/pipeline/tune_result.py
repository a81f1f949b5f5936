"""What a search writes: the content of ``schedule.json``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from tome_export.evaluation.metrics import CONFIDENCE, paired_difference, share_of
from tome_export.tune.choose import Finalist
from tome_export.tune.front import Score
from tome_export.tune.schedule_file import FORMAT
from tome_export.tune.space import Rs, Space, table_of

if TYPE_CHECKING:
    from tome_export.models import WeightsInfo
    from tome_export.pipeline.tune_images import TuneImages
    from tome_export.pipeline.tune_run import Choice
    from tome_export.pipeline.tune_score import Scorer
    from tome_export.tune.goal import Goal
    from tome_export.tune.table import CostTable

Latency = Callable[[Rs], float | None]


def values_of(
    *,
    model: str,
    weights: WeightsInfo,
    goal: Goal,
    batch: int,
    precision: str,
    images: TuneImages,
    scorer: Scorer,
    space: Space,
    found: Choice,
    constant: Finalist | None,
    front: Sequence[Finalist],
    table: CostTable | None,
    reducer: dict[str, Any],
    min_entropy: float | None,
    over_merged: int,
    searched: int,
    seconds: float,
) -> dict[str, Any]:
    """The content of the schedule file.

    Args:
        model: The recipe's name.
        weights: Those of the model.
        goal: What was asked for.
        batch: Images per run.
        precision: Of the model whose latency is measured.
        images: What was measured on.
        scorer: Knows the unmerged model's results.
        space: For MACs.
        found: The schedule found.
        constant: The best constant r for the same target; None if none that was found meets it.
        front: What the picture shows.
        table: The cost table, if latency was asked for.
        reducer: How tokens become fewer, as a manifest has it.
        min_entropy: Least token-size entropy allowed on any search image; None for any.
        over_merged: Schedules that were measured and have less.
        searched: Schedules that were measured on the search images.
        seconds: That all this took.
    """
    from tome_export.bench.environment import environment

    right = scorer.unmerged_right[: images.chosen_on]
    chosen = found.finalist
    unmerged: Rs = (0,) * space.depth

    def latency(r: Rs) -> float | None:
        return None if table is None else float(table.latency_ms(table_of([r]))[0])

    def entry(finalist: Finalist) -> dict[str, Any]:
        return _entry(finalist, space, latency, chosen)

    return {
        "format": FORMAT,
        "model": model,
        "weights": {"kind": weights.kind, "source": weights.source},
        "reducer": reducer,
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
            "latency_ms": found.latency_ms,
            "predicted_latency_ms": latency(chosen.point.r),
            "search_accuracy": _share(chosen.point.score),
            "validation_accuracy": _share(chosen.validation) if chosen.validation else None,
            "estimate": _estimate(chosen.point.r, images, scorer),
        },
        "best_constant": entry(constant) if constant else None,
        "unmerged": {
            "macs": int(space.macs(table_of([unmerged]))[0]),
            "latency_ms": found.unmerged_ms,
            "predicted_latency_ms": latency(unmerged),
            **_accuracy(int(right.sum()), len(right)),
            "search_accuracy": float(np.mean(right[: images.search])),
        },
        "front": [entry(finalist) for finalist in front],
        "cost_table": {**table.to_dict(), "batch": batch, "precision": precision} if table else {},
        "images": len(scorer.unmerged_right),
        "data": {
            "source": images.source,
            "available": images.available,
            "search": images.search,
            "validation": images.chosen_on - images.search,
            "held_out": len(scorer.unmerged_right) - images.chosen_on,
            "unreadable_count": images.unreadable,
            "notes": list(images.notes),
        },
        "search": {
            "schedules": searched,
            "min_entropy": min_entropy,
            "over_merged": over_merged,
            "validation_looks": found.looks if chosen.validation else 0,
            "ended_by_time_limit": found.cut_short,
        },
        "confidence": CONFIDENCE,
        "seconds": seconds,
        "environment": environment().model_dump(),
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
        "entropy": finalist.point.score.entropy,
        "chosen": point.r == chosen.point.r,
    }


def _accuracy(correct: int, images: int) -> dict[str, Any]:
    return {"accuracy": correct / images, "correct": correct}


def _estimate(r: Rs, images: TuneImages, scorer: Scorer) -> dict[str, Any] | None:
    """What to expect on images that are not here, with its interval.

    It comes from the held-out images alone. Where there are none it comes from the validation
    images, which the schedule was chosen with: then it is optimistic. Where there are none of those
    either, nothing can be said: the search picked what is right on its own images.
    """
    whole = len(scorer.unmerged_right)
    held_out = images.chosen_on < whole
    first, last = (images.chosen_on, whole) if held_out else (images.search, images.chosen_on)
    if first == last:
        return None
    right, unmerged = scorer.right(r, first, last), scorer.unmerged_right[first:last]
    return {
        "on": "held out" if held_out else "validation",
        **share_of(right).model_dump(),
        "unmerged": share_of(unmerged).model_dump(),
        "change": paired_difference(right, unmerged).model_dump(),
    }


def _share(score: Score) -> float:
    return score.correct / score.images
