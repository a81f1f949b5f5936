"""``tome-export tune``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, cast

import click

from tome_export.cli.options import (
    FILE,
    activation_option,
    order_option,
    output_options,
    reducer_options,
    weights_options,
)
from tome_export.cli.output import Terminal, fields, macs, percent, table
from tome_export.cli.progress import working
from tome_export.cli.request import precision_of
from tome_export.cli.text import RANDOM
from tome_export.errors import UnrecordedError
from tome_export.reducers import DEFAULT

if TYPE_CHECKING:
    from tome_export.artifact.goal import Goal
    from tome_export.artifact.schedule import Estimate, TunedPoint, TunedSchedule

KEPT = (
    "limit",
    "labels",
    "classes_in_order",
    "weights",
    "weights_key",
    "batch",
    "time_limit",
    "seed",
    "force",
    "min_entropy",
    "reducer",
    "activation",
)

ROWS = 6
"""Most rows of each method, besides the chosen one."""


@click.command("tune", short_help="Search the per-layer schedule for a target.")
@click.argument("model")
@click.option(
    "--target-latency-ms", type=float, metavar="X", help="At most X ms per run (ORT CPU)."
)
@click.option("--target-macs", metavar="50%|8.7G", help="At most so many MACs, or of the unmerged.")
@click.option(
    "--min-accuracy",
    metavar="-0.5|97.2",
    help="-0.5: at most half a point below the unmerged model; 97.2: percent.",
)
@click.option(
    "--data",
    multiple=True,
    metavar="FOLDER|SHARDS|samples",
    help="Images: top-1 with class sub-folders, else agreement with the unmerged model.  "
    "[default: samples]",
)
@click.option("--labels", type=FILE, metavar="FILE", help="Labels for a folder of --data.")
@order_option
@click.option("--limit", type=int, metavar="N", help="Most images.  [default: 2048, or fewer]")
@weights_options
@click.option("--batch", default=1, show_default=True, help="Images per run, for latency.")
@click.option("--fp16", is_flag=True, help="Latency in half precision.")
@click.option("--bf16", is_flag=True, help="Latency in bfloat16.")
@click.option("--fp32", is_flag=True, help="Latency in single precision, the default.")
@activation_option
@reducer_options
@click.option("--min-entropy", type=float, metavar="X", help="Least token-size entropy, 0 to 1.")
@click.option("--time-limit", default=600.0, show_default=True, help="Seconds after loading.")
@click.option("--seed", default=0, show_default=True, help="Of images, their split, the search.")
@click.option(
    "-o", "--output", type=FILE, default="schedule.json", show_default=True, metavar="FILE"
)
@click.option("--force", is_flag=True, help="Replace an existing file.")
@output_options
@click.pass_obj
def command(terminal: Terminal, /, model: str, output: Path, **given: Any) -> None:
    """Search how many tokens each layer of MODEL should merge; give exactly one target.

    The schedule goes into a file for 'tome-export build MODEL --schedule FILE'.
    """
    asked = the_target(given, "target_latency_ms", "target_macs", "min_accuracy")
    precision = precision_of(given)
    with working(terminal) as progress:
        from tome_export.tune.main import TuneRequest, tune

        more: dict[str, Any] = {name: given[name] for name in (*KEPT, "reducer_options")}
        if given["data"]:
            more["data"] = given["data"]
        goal = goal_from_option(asked, given[asked])
        unrecorded = None
        try:
            tuned = tune(TuneRequest(model, goal, output, precision=precision, **more), progress)
        except UnrecordedError as error:
            tuned, unrecorded = cast("TunedSchedule", error.result), str(error)
    values = {
        "file": str(output),
        **tuned.model_dump(mode="json"),
        **({"unrecorded": unrecorded} if unrecorded else {}),
    }
    terminal.recorded(values, tuned_lines(tuned, None if unrecorded else output), unrecorded)


def the_target(given: Mapping[str, Any], *names: str) -> str:
    """The one target that was given.

    Raises:
        click.UsageError: if none was, or several.
    """
    asked = [name for name in names if given[name] is not None]
    if len(asked) != 1:
        options = ", ".join(f"--{name.replace('_', '-')}" for name in names)
        raise click.UsageError(f"{len(asked)} targets were given; give exactly one of {options}")
    return asked[0]


def goal_from_option(name: str, value: Any) -> Goal:
    """A target from the option of that name.

    Raises:
        InputError: if the value is not one.
    """
    from tome_export.artifact.goal import Goal

    if name == "target_latency_ms":
        return Goal.target_latency(value)
    return Goal.target_macs(value) if name == "target_macs" else Goal.min_accuracy(value)


def tuned_lines(tuned: TunedSchedule, path: Path | None) -> list[str]:
    """All a person wants to know of a search, and the file that holds it, if one does."""
    data, search = tuned.data, tuned.search
    images = f"{data.search} to search"
    images += f", {data.validation} to choose" if data.validation else ", none to choose"
    images += f", {data.held_out} held out" if data.held_out else ""
    ended = ", ended by the time limit" if search.ended_by_time_limit else ""
    return [
        *([RANDOM] if tuned.weights.kind == "random" else []),
        *fields(
            [
                ("Model", tuned.model),
                *([] if (name := tuned.reducer.name) == DEFAULT else [("Reducer", name)]),
                ("Target", tuned.objective.text),
                ("Images", f"{tuned.images} of {data.source}: {images}"),
                ("Schedule", _list(tuned.found)),
                *_facts(tuned),
                _estimate(tuned.found.estimate, tuned.confidence),
                *_latency(tuned),
                ("Best constant r", _constant(tuned)),
            ]
        ),
        "",
        *_front(tuned),
        "",
        f"{search.schedules} schedules were searched in {tuned.seconds:.0f} s{ended}; "
        f"{search.validation_looks} were looked at on the images to choose with",
        *(f"Note: {note}" for note in data.notes),
        *([f"Schedule: {path}; build it with --schedule {path}"] if path else []),
    ]


def _facts(tuned: TunedSchedule) -> list[tuple[str, str]]:
    found, unmerged, asked = tuned.found, tuned.unmerged, tuned.search.min_entropy
    parts = f"search {percent(found.search_accuracy)}"
    if found.validation_accuracy is not None:
        parts += f", choice {percent(found.validation_accuracy)}"
    left_out = ""
    if asked is not None:
        left_out = f"; {tuned.search.over_merged} schedules fell under {asked:g} and were left out"
    return [
        ("MACs", f"{macs(found.macs)}, {_share(found, tuned)} of the unmerged model's"),
        (
            "Top-1" if tuned.objective.metric == "top1" else "Agreement",
            f"{percent(found.accuracy)} ({parts}), unmerged {percent(unmerged.accuracy)}",
        ),
        ("Entropy", f"{found.entropy:.4f} on the search image with the least{left_out}"),
    ]


def _estimate(estimate: Estimate | None, confidence: float) -> tuple[str, str]:
    """What to expect of images that are not here; the label says which images tell."""
    if estimate is None:
        return "Elsewhere", "unknown: all images were searched on"
    held_out, change = estimate.on == "held out", estimate.change
    why = "" if held_out else "; optimistic, the schedule was chosen with them"
    return (
        "Held out" if held_out else "Choice",
        f"{percent(estimate.share)} of {estimate.images}, unmerged "
        f"{percent(estimate.unmerged.share)}: {100 * change.share:+.2f} points, "
        f"{100 * confidence:g} % interval {100 * change.low:+.2f} to {100 * change.high:+.2f}{why}",
    )


def _latency(tuned: TunedSchedule) -> list[tuple[str, str]]:
    found, costs = tuned.found, tuned.cost_table
    if costs is None:
        return []
    return [
        (
            "Latency",
            f"{found.latency_ms:.3g} ms measured, {found.predicted_latency_ms:.3g} ms "
            f"predicted; unmerged {tuned.unmerged.latency_ms:.3g} ms (batch {costs.batch}, "
            f"{costs.precision}, ONNX Runtime CPU)",
        ),
        ("Cost table", f"{costs.measurements} schedules, residual {percent(costs.residual)}"),
    ]


def _constant(tuned: TunedSchedule) -> str:
    constant = tuned.best_constant
    if constant is None:
        return "none was found that meets the target"
    return (
        f"{_list(constant)}: {macs(constant.macs)} MACs, {_share(constant, tuned)}, "
        f"{percent(constant.accuracy)}"
    )


def _front(tuned: TunedSchedule) -> list[str]:
    """The Pareto front as a table, cheapest first; the chosen schedule is marked."""
    timed = tuned.cost_table is not None
    rows: list[TunedPoint] = []
    for method in dict.fromkeys(point.method for point in tuned.front):
        rows += thinned([point for point in tuned.front if point.method == method], ROWS)
    metric = "top-1" if tuned.objective.metric == "top1" else "agreement"
    return table(
        ["", "method", "MACs", "of unmerged", *(["ms"] * timed), metric, "r per layer"],
        [
            (
                "*" if point.chosen else "",
                point.method,
                macs(point.macs),
                _share(point, tuned),
                *([f"{point.latency_ms:.3g}"] if timed else []),
                percent(point.accuracy),
                _list(point),
            )
            for point in sorted(rows, key=lambda point: point.macs)
        ],
        f"llrr{'r' * timed}rl",
    )


class _Choosable(Protocol):
    @property
    def chosen(self) -> bool: ...


Row = TypeVar("Row", bound=_Choosable)


def thinned(rows: Sequence[Row], most: int) -> list[Row]:
    """At most so many rows, evenly, and the chosen one."""
    step = max(1.0, (len(rows) - 1) / (most - 1))
    index = {round(step * i) for i in range(most)}
    return [row for i, row in enumerate(rows) if i in index or row.chosen]


def _list(point: TunedPoint) -> str:
    return ",".join(map(str, point.schedule))


def _share(point: TunedPoint, tuned: TunedSchedule) -> str:
    return f"{100 * point.macs / tuned.unmerged.macs:.1f} %"
