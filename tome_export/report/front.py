"""Accuracy against cost: the section on the front that ``tune`` found, and a cascade's own page."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from tome_export.artifact import Manifest
from tome_export.artifact.cascade import Cascade, CascadeTest
from tome_export.artifact.evaluation import Share
from tome_export.artifact.schedule import TunedPoint, TunedSchedule
from tome_export.display import counted, macs, macs_unit, milliseconds, percent, points, span, times
from tome_export.report.parts import Section, Table, Text
from tome_export.report.plot import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    VERMILLION,
    Form,
    bars,
    chart,
    legend,
    panels,
    reach,
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

METRICS = {"top1": "top-1 accuracy", "agreement": "agreement with the {}"}

POLICIES = {
    "complexity": "The artifact is chosen by the complexity of the image, the mean absolute "
    "difference of neighbouring pixels.",
    "confidence": "Every image begins at the lowest artifact and goes on to the next while the "
    "confidence is under a threshold; it costs the sum of all that it was given to.",
    "learned": "The artifact is chosen by a linear head on the pooled patch embedding.",
}


def front_section(report: TunedSchedule | None, manifest: Manifest) -> Section:
    """Accuracy against MACs, and latency where it is known, of the schedules that were tried."""
    if report is None or not report.front:
        return Section(
            "front",
            TITLE,
            command=f"tome-export tune {manifest.model.name}",
            adds="the schedules worth a look, in a file that 'build --schedule' takes",
        )
    metric = METRICS[report.objective.metric].format("unmerged model")
    best = efficient(report.front)
    lead = (
        f"{counted(len(report.front), 'schedule')} for {report.objective.kind} "
        f"{report.objective.value:g}, measured by {metric} on {counted(report.images, 'image')} in "
        f"{report.seconds:,.0f} s. {counted(len(best), 'schedule')} of them "
        f"{'is' if len(best) == 1 else 'are'} on the front: no other is as good at fewer MACs. "
        f"This artifact has {'the' if manifest.merge.r == report.schedule else 'another'} schedule "
        f"{'that' if manifest.merge.r == report.schedule else 'than the one that'} was chosen."
    )
    caption = (
        f"{metric[:1].upper()}{metric[1:]} against MACs"
        f"{' and against latency' if _timed(report) else ''}, by the way r is spread over the "
        "layers; the line joins the front, a ring marks the schedule that was chosen, a square "
        "the unmerged model."
    )
    drawing = chart("front", caption, lambda form: _draw_front(form, report, metric))
    return Section("front", TITLE, (Text(lead), drawing, _front_table(report, best, metric)))


def efficient(front: Iterable[TunedPoint], cost: str = "macs") -> list[TunedPoint]:
    """The points than which none costs less and is as accurate, by cost.

    Args:
        front: All points.
        cost: What counts: ``macs`` or ``latency_ms``.
    """
    found: list[TunedPoint] = []
    for point in sorted(front, key=lambda p: (getattr(p, cost), -p.accuracy)):
        if not found or point.accuracy > found[-1].accuracy:
            found.append(point)
    return found


def _timed(report: TunedSchedule) -> bool:
    return all(point.latency_ms is not None for point in report.front)


def _front_table(report: TunedSchedule, best: Sequence[TunedPoint], metric: str) -> Table:
    rows = [
        (
            _short(point.schedule),
            point.method,
            macs(point.macs),
            times(report.unmerged.macs / point.macs) if point.macs else "",
            milliseconds(point.latency_ms),
            percent(point.accuracy, 2),
            "chosen" if point.chosen else "",
        )
        for point in best
    ]
    headers = ("r per layer", "method", "MACs", "ratio", "latency ms", metric, "")
    return Table(
        "Schedules on the front", headers, rows, "llrrrrl", _marked(p.chosen for p in best)
    )


def _marked(chosen: Iterable[bool]) -> frozenset[int]:
    return frozenset(index for index, is_chosen in enumerate(chosen) if is_chosen)


def _short(schedule: Sequence[int]) -> str:
    same = len(set(schedule)) == 1 and len(schedule) > 1
    return f"{schedule[0]} in every layer" if same else ", ".join(map(str, schedule))


def _draw_front(form: Form, report: TunedSchedule, metric: str) -> Figure:
    timed = _timed(report)
    figure, axes = panels(form, 1 + timed, 3.3, narrow_height=2.9)
    largest = max(report.unmerged.macs, *(point.macs for point in report.front))
    scale, unit = macs_unit(largest)
    _scatter(axes[0], report, "macs", scale)
    axes[0].set_xlabel(f"{unit} per image")
    if timed:
        _scatter(axes[1], report, "latency_ms", 1.0)
        axes[1].set_xlabel("latency (ms)")
    for one in axes:
        one.set_ylabel(f"{metric} (%)" if form.wide else "accuracy (%)")
    legend(figure, axes[0], form)
    return figure


def _scatter(axes: Axes, report: TunedSchedule, cost: str, scale: float) -> None:
    def placed(found: Iterable[TunedPoint]) -> tuple[list[float], list[float]]:
        points = list(found)
        return [getattr(p, cost) / scale for p in points], [100 * p.accuracy for p in points]

    line = placed(efficient(report.front, cost))
    axes.plot(*line, color=GREY, linewidth=1.1, drawstyle="steps-post")
    for method in dict.fromkeys(point.method for point in report.front):
        colour, marker = METHODS[method]
        shown = placed(point for point in report.front if point.method == method)
        axes.scatter(*shown, 26, color=colour, marker=marker, label=method, zorder=3)
    chosen = [point for point in report.front if point.chosen]
    if chosen:
        ring(axes, *placed(chosen))
    plain = getattr(report.unmerged, cost)
    if plain is not None:
        accuracy = [100 * report.unmerged.accuracy]
        axes.scatter([plain / scale], accuracy, 30, color=GREY, marker="s", label="unmerged")


def cascade_section(cascade: Cascade) -> Section:
    """Accuracy against mean MACs: text, chart and tables, the members alone as the baseline."""
    data, chosen = cascade.data, cascade.chosen.test
    metric = METRICS[cascade.metric].format("highest artifact")
    level = percent(cascade.confidence, 0)
    fitted = f", trained on {counted(data.fitted, 'image')}" if data.fitted else ""
    lead = (
        f"{POLICIES[cascade.policy]} Target: {cascade.target.text}. Calibrated on "
        f"{counted(data.calibration, 'image')}{fitted}; all that is shown was measured on "
        f"{counted(data.test, 'other image')}."
    )
    result = (
        f"The chosen setting takes {macs(chosen.macs)} per image on average at "
        f"{percent(chosen.share, 2)} {metric} ({level} interval {_interval(chosen)}), "
        f"{points(chosen.difference_to_highest.share)} points against the highest artifact. "
        f"{_single(cascade)}"
    )
    missed = () if chosen.met else (Text("The target is missed on these images.", "bad"),)
    caption = (
        f"{metric[:1].upper()}{metric[1:]} against mean MACs per image on the test images: the "
        "line joins the settings that no other beats on the calibration images, a ring marks the "
        f"chosen one, circles are the artifacts alone with intervals of {level}."
    )
    drawing = chart("cascade", caption, lambda form: _draw_cascade(form, cascade, metric))
    tables = _members(cascade, metric), _sweep(cascade)
    blocks = (Text(lead), Text(result), *missed, drawing, *tables)
    return Section("cascade", "Budgets per image", blocks)


def _draw_cascade(form: Form, cascade: Cascade, metric: str) -> Figure:
    """Members with their intervals, the sweep as a line, the chosen setting ringed."""
    figure, (axes,) = panels(form, 1, 3.6, narrow_height=3.1)
    scale, unit = macs_unit(max(one.macs for one in cascade.members))
    line = sorted((one.test.macs / scale, 100 * one.test.share) for one in cascade.sweep)
    axes.plot(*np.array(line).T, "-D", color=VERMILLION, ms=3.5, label=cascade.policy)
    alone = [(one.test.share, one.test.low, one.test.high) for one in cascade.members]
    share, low, high = 100 * np.array(alone).T
    cost = [one.macs / scale for one in cascade.members]
    error = reach(share, low, high)
    axes.errorbar(cost, share, yerr=error, label="one artifact for all", **bars(BLUE))
    chosen = cascade.chosen.test
    ring(axes, [chosen.macs / scale], [100 * chosen.share])
    axes.set_xlabel(f"mean {unit} per image")
    axes.set_ylabel(f"{metric} (%)" if form.wide else "accuracy (%)")
    legend(figure, axes, form)
    return figure


def _interval(found: Share | CascadeTest) -> str:
    return span(percent(found.low, 2), percent(found.high, 2))


def _single(cascade: Cascade) -> str:
    single = cascade.single
    if single is None:
        return "No artifact alone is as accurate on these images."
    word = "fewer" if single.saved >= 0 else "more"
    return (
        f"The cheapest artifact alone that is as accurate takes {macs(single.macs)}: "
        f"{percent(abs(single.saved))} {word} MACs."
    )


def _members(cascade: Cascade, metric: str) -> Table:
    """The artifacts, and how many of the images end at each."""
    budgets = zip(cascade.members, cascade.chosen.test.budgets, strict=True)
    rows = [
        (
            index,
            one.schedule,
            macs(one.macs),
            percent(one.test.share, 2),
            _interval(one.test),
            percent(count / cascade.data.test),
        )
        for index, (one, count) in enumerate(budgets)
    ]
    headers = ("budget", "schedule", "MACs", metric, "interval", "images that end here")
    return Table("The artifacts", headers, rows, "llrrrr")


def _sweep(cascade: Cascade) -> Table:
    rows = [
        (
            macs(one.calibration.macs),
            percent(one.calibration.share, 2),
            macs(one.test.macs),
            percent(one.test.share, 2),
            "chosen" if one.chosen else "",
        )
        for one in cascade.sweep
    ]
    headers = ("calibration MACs", "accuracy", "test MACs", "accuracy", "")
    return Table(
        "The sweep of thresholds", headers, rows, "rrrrl", _marked(p.chosen for p in cascade.sweep)
    )
