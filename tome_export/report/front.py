"""The section on the Pareto front that ``tune`` found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from tome_export.artifact import Manifest
from tome_export.report.numbers import (
    counted,
    fixed,
    macs,
    macs_unit,
    milliseconds,
    percent,
    times,
)
from tome_export.report.parts import Drawing, Section, Table, Text
from tome_export.report.plot import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PURPLE,
    VERMILLION,
    Form,
    chart,
    legend,
    panels,
    ring,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TITLE = "Pareto front"

METHODS = {
    "constant": (BLUE, "o"),
    "decreasing": (ORANGE, "v"),
    "increasing": (GREEN, "^"),
    "free": (VERMILLION, "D"),
}
"""Colour and marker of each way to spread r over the layers."""

METRICS = {"top1": "top-1 accuracy", "agreement": "agreement with the unmerged model"}

Point = Mapping[str, Any]


def front_section(report: Mapping[str, Any] | None, manifest: Manifest) -> Section:
    """Accuracy against MACs, and latency where it is known, of the schedules that were tried."""
    if report is None or not report["front"]:
        name = manifest.model.name
        return Section(
            "front",
            TITLE,
            command=f"tome-export tune {name}",
            adds="the schedules worth a look, in a file that 'build --schedule' takes",
        )
    objective, front = report["objective"], report["front"]
    metric = METRICS.get(objective["metric"], objective["metric"])
    best = efficient(front)
    lead = (
        f"{counted(len(front), 'schedule')} for {objective['kind']} "
        f"{objective['value']:g}, measured by {metric}"
        f"{' on ' + counted(report['images'], 'image') if report.get('images') else ''}"
        f"{_duration(report.get('seconds'))}. {counted(len(best), 'schedule')} of them "
        f"{'is' if len(best) == 1 else 'are'} on the front: no other is as good at fewer MACs."
    )
    caption = (
        f"{metric[:1].upper()}{metric[1:]} against MACs"
        f"{' and against latency' if _timed(front) else ''}, by the way r is spread over the "
        "layers; the line joins the front, a ring marks the schedule that was chosen, a square "
        "the unmerged model."
    )
    own = list(manifest.merge.r)
    matches = own == list(report["schedule"])
    note = (
        "This artifact has the schedule that was chosen."
        if matches
        else ("This artifact has another schedule than the one that was chosen.")
    )
    return Section(
        "front",
        TITLE,
        (
            Text(f"{lead} {note}"),
            Drawing(chart("front", caption, lambda form: _draw(form, report, metric))),
            _table(best, report["unmerged"], metric),
        ),
    )


def efficient(front: Sequence[Point]) -> list[Point]:
    """The points than which none has fewer MACs and is as accurate, by MACs."""
    found: list[Point] = []
    for point in sorted(front, key=lambda p: (p["macs"], -p["accuracy"])):
        if not found or point["accuracy"] > found[-1]["accuracy"]:
            found.append(point)
    return found


def _duration(seconds: float | None) -> str:
    return "" if seconds is None else f" in {fixed(seconds, 0)} s"


def _timed(front: Sequence[Point]) -> bool:
    return all(point.get("latency_ms") is not None for point in front)


def _table(best: Sequence[Point], unmerged: Point, metric: str) -> Table:
    rows = [
        (
            _short(point["schedule"]),
            point["method"],
            macs(point["macs"]),
            times(unmerged["macs"] / point["macs"]) if point["macs"] else "",
            milliseconds(point.get("latency_ms")),
            percent(point["accuracy"], 2),
            "chosen" if point["chosen"] else "",
        )
        for point in best
    ]
    headers = ("r per layer", "method", "MACs", "ratio", "latency ms", metric, "")
    marked = frozenset(index for index, point in enumerate(best) if point["chosen"])
    return Table("Schedules on the front", headers, rows, "llrrrrl", marked)


def _short(schedule: Sequence[int]) -> str:
    same = len(set(schedule)) == 1 and len(schedule) > 1
    return f"{schedule[0]} in every layer" if same else ", ".join(map(str, schedule))


def _draw(form: Form, report: Mapping[str, Any], metric: str) -> Figure:
    timed = _timed(report["front"])
    figure, axes = panels(form, 1 + timed, 3.3, narrow_height=2.9)
    every = [*report["front"], report["unmerged"]]
    scale, unit = macs_unit(max(point["macs"] for point in every))
    _scatter(axes[0], report, "macs", scale)
    axes[0].set_xlabel(f"{unit} per image")
    if timed:
        _scatter(axes[1], report, "latency_ms", 1.0)
        axes[1].set_xlabel("latency (ms)")
    for one in axes:
        one.set_ylabel(f"{metric} (%)" if form.wide else "accuracy (%)")
    legend(figure, axes[0], form)
    return figure


def _scatter(axes: Axes, report: Mapping[str, Any], key: str, scale: float) -> None:
    front = report["front"]
    line = efficient([{**point, "macs": point[key]} for point in front])
    axes.plot(
        [point["macs"] / scale for point in line],
        [100 * point["accuracy"] for point in line],
        color=GREY,
        linewidth=1.1,
        drawstyle="steps-post",
    )
    for method in dict.fromkeys(point["method"] for point in front):
        colour, marker = METHODS.get(method, (PURPLE, "P"))
        points = np.array([(p[key], p["accuracy"]) for p in front if p["method"] == method])
        axes.scatter(
            points[:, 0] / scale,
            100 * points[:, 1],
            26,
            color=colour,
            marker=marker,
            label=method,
            zorder=3,
        )
    chosen = [point for point in front if point["chosen"]]
    if chosen:
        ring(
            axes,
            [point[key] / scale for point in chosen],
            [100 * point["accuracy"] for point in chosen],
        )
    plain = report["unmerged"]
    if plain.get(key) is not None:
        axes.scatter(
            [plain[key] / scale],
            [100 * plain["accuracy"]],
            30,
            color=GREY,
            marker="s",
            label="unmerged",
        )
