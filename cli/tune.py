"""``tome-export tune``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import click

from tome_export.cli.format import RANDOM, fields, table
from tome_export.cli.options import (
    Group,
    ImageSizeGroup,
    LabelsGroup,
    PrecisionGroup,
    ReducerGroup,
    WeightsGroup,
    grouped_command,
    option,
)
from tome_export.cli.output import Terminal
from tome_export.cli.progress import working
from tome_export.display import percent, scored, short_macs
from tome_export.errors import UnrecordedError
from tome_export.reducers import DEFAULT

if TYPE_CHECKING:
    from tome_export.artifact.goal import Goal
    from tome_export.artifact.schedule import (
        Estimate,
        Similarity,
        SimilarityEstimate,
        TunedPoint,
        TunedSchedule,
    )

METRICS = {
    "top1": "Top-1",
    "agreement": "Agreement",
    "similarity": "Similarity",
    "retrieval": "Same neighbour",
}
"""What is counted, as ``goal.Metric``, in words."""

ROWS = 6
"""Most rows of each method, besides the chosen one."""


class Targets(Group):
    """Target."""

    def goal(self, *names: str) -> Goal:
        """The one of these options that was given; a usage error if none was, or several."""
        given = [name for name in names if getattr(self, name) is not None]
        if len(given) != 1:
            flags = ", ".join(f"--{name.replace('_', '-')}" for name in names)
            raise click.UsageError(f"{len(given)} targets were given; give exactly one of {flags}")
        from tome_export.artifact.goal import Goal

        goal: Goal = getattr(Goal, given[0].removesuffix("_ms"))(getattr(self, given[0]))
        return goal


class TuneOptions(Targets, LabelsGroup, WeightsGroup, ImageSizeGroup, ReducerGroup, PrecisionGroup):
    """Target."""

    target_latency_ms: float | None = option(
        metavar="X", help="At most X ms per run (ORT CPU), in the precision given below."
    )
    target_macs: str | None = option(
        metavar="50%|8.7G", help="At most so many MACs, or of the unmerged."
    )
    min_accuracy: str | None = option(
        metavar="-0.5|97.2",
        help="-0.5: at most half a point below the unmerged model; 97.2: percent.",
    )
    min_similarity: float | None = option(
        metavar="0.98",
        help="Of models without classes: mean similarity to the unmerged output, 0 to 1.",
    )
    measure: Literal["similarity", "retrieval"] | None = option(
        help="Of models without classes: cosine of features or correlation of maps, or whether "
        "images keep their nearest neighbour.  [default: similarity]",
    )
    data: tuple[str, ...] = option(
        heading="Images",
        metavar="FOLDER|SHARDS|samples",
        default=("samples",),
        help="Images: top-1 with class sub-folders, else compared with the unmerged model.",
    )
    limit: int | None = option(
        heading="Images", metavar="N", help="Most images.  [default: 2048, or fewer]"
    )
    batch: int = option(heading="Images", default=1, help="Images per run, for latency.")
    min_entropy: float | None = option(
        heading="Merging", metavar="X", help="Least token-size entropy, 0 to 1."
    )
    time_limit: float = option(heading="Merging", default=600.0, help="Seconds after loading.")
    seed: int = option(
        heading="Merging", default=0, show_default=True, help="Of images, their split, the search."
    )
    output: Path = option(
        "-o", "--output", heading="Output", default="schedule.json", metavar="FILE"
    )
    force: bool = option(heading="Output", help="Replace an existing file.")


@grouped_command(
    "tune",
    "Search the per-layer schedule for a target.",
    example="tome-export tune vit_b16 --target-macs 60% --data imagenet/val",
)
@click.argument("model")
def command(terminal: Terminal, /, model: str, options: TuneOptions) -> None:
    """Search how many tokens each layer of MODEL should merge; give exactly one target.

    The schedule goes into a file for 'tome-export build MODEL --schedule FILE'.
    """
    with working(terminal) as progress:
        goal = options.goal("target_latency_ms", "target_macs", "min_accuracy", "min_similarity")
        precision = options.precision
        from tome_export.tune.main import TuneRequest, tune

        request = options.request(TuneRequest, model=model, goal=goal, precision=precision)
        unrecorded = None
        try:
            tuned = tune(request, progress)
        except UnrecordedError as error:
            tuned, unrecorded = cast("TunedSchedule", error.result), str(error)
    path = options.output
    values = {"file": str(path), **tuned.model_dump(mode="json")}
    values |= {"unrecorded": unrecorded} if unrecorded else {}
    asked = "" if options.image_size is None else f" --image-size {options.image_size}"
    build_with = None if unrecorded else f"{path}; build it with --schedule {path}{asked}"
    terminal.recorded(values, _lines(tuned, build_with), unrecorded)


def _lines(tuned: TunedSchedule, build_with: str | None) -> list[str]:
    """All a person wants to know of a search, and how to build from its file, if there is one."""
    data, search = tuned.data, tuned.search
    ended = ", ended by the time limit" if search.ended_by_time_limit else ""
    return [
        *([RANDOM] if tuned.weights.kind == "random" else []),
        *fields(_facts(tuned)),
        "",
        *_front(tuned),
        "",
        f"{search.schedules} schedules were searched in {tuned.seconds:.0f} s{ended}; "
        f"{search.validation_looks} were looked at on the images to choose with",
        *(f"Note: {note}" for note in data.notes),
        *([f"Schedule: {build_with}"] if build_with else []),
    ]


def _facts(tuned: TunedSchedule) -> dict[str, str]:
    from tome_export.artifact.schedule import ChosenPoint

    data, search, found, unmerged = tuned.data, tuned.search, tuned.found, tuned.unmerged
    metric = tuned.objective.metric
    images = f"{data.search} to search"
    images += f", {data.validation} to choose" if data.validation else ", none to choose"
    images += f", {data.held_out} held out" if data.held_out else ""
    facts = {"Model": tuned.model}
    if tuned.reducer.name != DEFAULT:
        facts["Reducer"] = tuned.reducer.name
    facts |= {
        "Target": tuned.objective.text,
        "Images": f"{tuned.images} of {data.source}: {images}",
        "Schedule": _list(found),
        "MACs": f"{short_macs(found.macs)}, {_share(found, tuned)} of the unmerged model's",
    }
    if isinstance(found, ChosenPoint):
        parts = f"search {percent(found.search_accuracy)}"
        if found.validation_accuracy is not None:
            parts += f", choice {percent(found.validation_accuracy)}"
        accuracy = f"{percent(found.accuracy)} ({parts})"
        known = unmerged.accuracy is not None
        facts[METRICS[metric]] = accuracy + f", unmerged {percent(unmerged.accuracy)}" * known
    if found.similarity is not None:
        facts[METRICS["similarity"]] = _similarity(found.similarity)
    facts["Entropy"] = f"{found.entropy:.4f} on the search image with the least"
    if search.min_entropy is not None:
        limit = f"{search.min_entropy:g}"
        facts["Entropy"] += f"; {search.over_merged} schedules fell under {limit} and were left out"
    if found.estimate is None:
        facts["Elsewhere"] = "unknown: all images were searched on"
    else:
        text = _estimate(found.estimate, f"{100 * tuned.confidence:g} % interval")
        held_out = found.estimate.on == "held out"
        facts["Held out" if held_out else "Choice"] = (
            text if held_out else f"{text}; optimistic, the schedule was chosen with them"
        )
    if (costs := tuned.cost_table) is not None:
        facts["Latency"] = (
            f"{found.latency_ms:.3g} ms measured, {found.predicted_latency_ms:.3g} ms predicted; "
            f"unmerged {unmerged.latency_ms:.3g} ms (batch {costs.batch}, {costs.precision}, ONNX "
            "Runtime CPU)"
        )
        residual = percent(costs.residual)
        facts["Cost table"] = f"{costs.measurements} schedules, residual {residual}"
    best = "none was found that meets the target"
    if (constant := tuned.best_constant) is not None:
        best = f"{_list(constant)}: {short_macs(constant.macs)} MACs, {_share(constant, tuned)}, "
        best += scored(constant.counted, metric)
    return {**facts, "Best constant r": best}


def _similarity(found: Similarity) -> str:
    text = f"mean {found.mean:.4f}, lowest {found.lowest:.4f}"
    if found.mean_absolute_difference is not None:
        text += f", mean absolute difference {found.mean_absolute_difference:.3g}"
    return text


def _estimate(estimate: Estimate | SimilarityEstimate, interval: str) -> str:
    """What to expect of images that are not here."""
    from tome_export.artifact.schedule import SimilarityEstimate

    if isinstance(estimate, SimilarityEstimate):
        text = f"{estimate.mean:.4f} over {estimate.images}, {interval} {estimate.low:.4f} to "
        text += f"{estimate.high:.4f}, lowest {estimate.lowest:.4f}"
        if estimate.best_constant is not None and (more := estimate.over_constant) is not None:
            text += f"; best constant r {estimate.best_constant.mean:.4f}: {more.mean:+.4f}, "
            text += f"{more.low:+.4f} to {more.high:+.4f}"
        return text
    change, text = estimate.change, f"{percent(estimate.share)} of {estimate.images}, unmerged "
    text += f"{percent(estimate.unmerged.share)}: {100 * change.share:+.2f} points, "
    text += f"{interval} {100 * change.low:+.2f} to {100 * change.high:+.2f}"
    if estimate.best_constant is not None and (points := estimate.over_constant) is not None:
        text += f"; best constant r {percent(estimate.best_constant.share)}: "
        text += f"{100 * points.share:+.2f} points, "
        text += f"{100 * points.low:+.2f} to {100 * points.high:+.2f}"
    return text


def _front(tuned: TunedSchedule) -> list[str]:
    """The Pareto front as a table, cheapest first; the chosen schedule is marked."""
    timed = tuned.cost_table is not None
    rows: list[TunedPoint] = []
    for method in dict.fromkeys(point.method for point in tuned.front):
        rows += thinned([point for point in tuned.front if point.method == method], ROWS)
    metric = tuned.objective.metric
    with_lowest = metric == "similarity"
    head = ["", "method", "MACs", "of unmerged", *(["ms"] * timed), METRICS[metric].lower()]
    return table(
        [*head, *(["lowest"] * with_lowest), "r per layer"],
        [
            (
                "*" if point.chosen else "",
                point.method,
                short_macs(point.macs),
                _share(point, tuned),
                *([f"{point.latency_ms:.3g}"] if timed else []),
                scored(point.counted, metric),
                *([f"{point.similarity.lowest:.4f}"] if with_lowest and point.similarity else []),
                _list(point),
            )
            for point in sorted(rows, key=lambda point: point.macs)
        ],
        f"llrr{'r' * timed}r{'r' * with_lowest}l",
    )


def thinned(rows: Sequence[Any], most: int) -> list[Any]:
    """At most so many rows, evenly, and the chosen one."""
    step = max(1.0, (len(rows) - 1) / (most - 1))
    index = {round(step * i) for i in range(most)}
    return [row for i, row in enumerate(rows) if i in index or row.chosen]


def _list(point: TunedPoint) -> str:
    return ",".join(map(str, point.schedule))


def _share(point: TunedPoint, tuned: TunedSchedule) -> str:
    return f"{100 * point.macs / tuned.unmerged.macs:.1f} %"
