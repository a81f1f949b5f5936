"""What each chart of the page shows; every function draws one in a given size."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from tome_export.artifact.bench import Bench, BenchProfile, Quantiles
from tome_export.artifact.cascade import Cascade
from tome_export.artifact.evaluation import CandidateResult, Deviations, Evaluation, Share
from tome_export.artifact.manifest import Layer
from tome_export.artifact.parity import LayerParity
from tome_export.artifact.schedule import TunedPoint, TunedSchedule
from tome_export.display import TIMES, macs_unit
from tome_export.report.plot import (
    BLUE,
    GREEN,
    GREY,
    INK,
    ORANGE,
    PURPLE,
    RULE,
    SKY,
    VERMILLION,
    YELLOW,
    Form,
    bars,
    legend,
    named_rows,
    panels,
    power_ticks,
    reach,
    ring,
    whole_numbers,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

CANDIDATES = {"merged": (BLUE, "o"), "unmerged": (GREY, "s")}
"""Colour and marker of the two models that every evaluation has."""

REST = ((VERMILLION, "D"), (GREEN, "^"), (PURPLE, "v"), (ORANGE, "P"), (SKY, "X"))
"""Those of other models, in their order."""

METHODS = {
    "constant": (BLUE, "o"),
    "decreasing": (ORANGE, "v"),
    "increasing": (GREEN, "^"),
    "free": (VERMILLION, "D"),
}
"""Colour and marker of each way to spread r over the layers."""

OTHER = "other"
"""The group of what belongs to no other; plain grey, and last."""

GROUPS = {
    "attention": BLUE,
    "mlp": SKY,
    "match": VERMILLION,
    "merge": ORANGE,
    "norm": GREEN,
    "embedding": PURPLE,
    "head": YELLOW,
    OTHER: GREY,
}
"""Colours of the groups that every profile has."""

HATCHES = ("////", "....", "xxxx", "----")
"""Of further groups, which are grey, in their order."""

Measure = Literal[
    "top1",
    "agreement_with_unmerged",
    "cosine_to_unmerged",
    "correlation_to_unmerged",
    "deviation_from_unmerged",
]

MEASURES: dict[Measure, str] = {
    "top1": "top-1 accuracy (%)",
    "agreement_with_unmerged": "agreement (%)",
    "cosine_to_unmerged": "cosine",
    "correlation_to_unmerged": "correlation",
    "deviation_from_unmerged": "deviation",
}
"""What an evaluation may have of its models, the most telling first -> label of its axis."""


def draw_layers(form: Form, layers: Sequence[Layer], subject: str) -> Figure:
    """Tokens after each layer, and MACs of each."""
    figure, (tokens, cost) = panels(form, 2, 2.9, narrow_height=2.35)
    index, before = np.arange(len(layers)), layers[0].tokens_in
    tokens.axhline(before, color=GREY, linestyle=(0, (4, 2)), label="unmerged")
    after = [layer.tokens_out for layer in layers]
    tokens.plot(index, after, color=BLUE, marker="o", label="merged")
    tokens.set_ylim(0, before * 1.08)
    tokens.set_ylabel("tokens after the layer")
    scale, unit = macs_unit(max(layer.macs_unmerged for layer in layers))
    cost.bar(index - 0.21, [one.macs_unmerged / scale for one in layers], 0.38, color=GREY)
    cost.bar(index + 0.21, [one.macs / scale for one in layers], 0.38, color=BLUE)
    cost.set_ylabel(f"{unit} per {subject}")
    for axes in (tokens, cost):
        whole_numbers(axes, form, len(layers))
    legend(figure, tokens, form)
    return figure


def draw_parity(form: Form, layers: Sequence[LayerParity]) -> Figure:
    """Margins of the decisions that differ, and errors of scores, with what rounding allows."""
    figure, (margin, error) = panels(form, 2, 2.9, narrow_height=2.35)
    bound: Any = {"color": GREY, "marker": "_", "markersize": 11, "markeredgewidth": 2}
    bound |= {"linestyle": (0, (1, 2)), "linewidth": 1}
    dots: Any = {"marker": "o", "markersize": 5.5, "markeredgewidth": 0, "linestyle": "none"}

    def series(axes: Axes, name: str, label: str, look: Any) -> None:
        values = [(one.layer, float(getattr(one, name))) for one in layers]
        found = [(layer, value) for layer, value in values if value and math.isfinite(value)]
        if found:
            axes.plot(*zip(*found, strict=True), label=label, **look)

    series(margin, "margin_bound", "bound, or allowed", bound)
    series(margin, "largest_margin", "largest margin that differs", {**dots, "color": VERMILLION})
    series(error, "score_error_allowed", "_", bound)
    series(error, "score_error", "score error", {**dots, "color": BLUE})
    margin.set_ylabel("score margin (cosine)")
    error.set_ylabel("score error (cosine)")
    for axes in (margin, error):
        whole_numbers(axes, form, max(layer.layer for layer in layers) + 1)
        power_ticks(axes)
    handles = [handle for axes in (margin, error) for handle in axes.get_legend_handles_labels()[0]]
    legend(figure, margin, form, handles)
    return figure


def draw_speed(form: Form, bench: Bench, other: str) -> Figure:
    """Latency of both models, and the speed-up with the ratio of MACs as a line."""
    rows = bench.rows
    height = 0.9 + 0.5 * len(rows)
    figure, (latency, speedup) = panels(form, 2, max(2.2, height), narrow_height=max(1.9, height))
    y = np.arange(len(rows))
    for offset, timed, colour, label in (
        (-0.2, [row.against for row in rows], GREY, other),
        (0.2, [row.merged for row in rows], BLUE, "merged"),
    ):
        low, middle, high = _quantiles(one.latency_ms for one in timed)
        latency.barh(y + offset, middle, 0.36, color=colour, label=label)
        error: Any = {"fmt": "none", "ecolor": INK, "elinewidth": 0.9, "capsize": 2}
        latency.errorbar(middle, y + offset, xerr=reach(middle, low, high), **error)
    low, middle, high = _quantiles(row.speedup for row in rows)
    speedup.errorbar(middle, y, xerr=reach(middle, low, high), **bars(BLUE))
    limit = bench.macs_ratio
    style: Any = {"color": VERMILLION, "linestyle": (0, (4, 2)), "linewidth": 1.3}
    line = speedup.axvline(limit, label="MACs limit", **style)
    speedup.axvline(1, color=GREY, linewidth=0.9)
    speedup.set_xlim(min(0.9, float(low.min()) * 0.95), max(limit, float(high.max())) * 1.08)
    latency.set_xlabel("latency of a batch (ms)")
    speedup.set_xlabel(f"speed-up ({TIMES})")
    joint = "\n" if form == "wide" else ", "
    several = len({row.backend for row in rows}) > 1
    names = [f"{row.backend + joint if several else ''}batch {row.batch}" for row in rows]
    for axes in (latency, speedup):
        named_rows(axes)
        axes.set_ylim(len(rows) - 0.45, -0.55)
        axes.set_yticks(y, names)
    speedup.spines["left"].set_visible(False)
    if form == "wide":
        speedup.set_yticklabels([])
    legend(figure, latency, form, [*latency.get_legend_handles_labels()[0], line])
    return figure


def _quantiles(found: Iterable[Quantiles]) -> NDArray[np.float64]:
    """20th, 50th and 80th percentiles ``[3, B]``."""
    rows: NDArray[np.float64] = np.array([(one.p20, one.p50, one.p80) for one in found]).T
    return rows


def profile_groups(profile: BenchProfile) -> list[str]:
    """The parts of both models in the order of their colours; what belongs to none is last."""
    found = {*profile.merged.groups_ms, *profile.against.groups_ms}
    known = [group for group in GROUPS if group in found]
    sides = (profile.against.groups_ms, profile.merged.groups_ms)
    rest = dict.fromkeys(g for side in sides for g in side if g not in GROUPS)
    return sorted([*known, *rest], key=lambda group: group == OTHER)


def draw_profile(
    form: Form, models: Mapping[str, Mapping[str, float]], groups: Sequence[str]
) -> Figure:
    """Time in each part of each model as a stacked bar."""
    figure, (axes,) = panels(form, 1, 1.25 + 0.42 * len(models), narrow_height=2.5)
    rest = iter(HATCHES * (1 + len(groups) // len(HATCHES)))
    left = np.zeros(len(models))
    for group in groups:
        hatch = "" if group in GROUPS else next(rest)
        widths = [groups_ms.get(group, 0.0) for groups_ms in models.values()]
        style: Any = {"color": GROUPS.get(group, GREY), "hatch": hatch, "label": group}
        style["edgecolor"] = RULE if hatch else "none"
        axes.barh(list(models), widths, 0.62, left=left, **style)
        left += widths
    named_rows(axes)
    axes.invert_yaxis()
    axes.set_xlabel("time per run (ms)")
    legend(figure, axes, form)
    return figure


def measure_of(evaluation: Evaluation) -> Measure | None:
    """What there is to show of an evaluation: labels come before all else."""
    found = (m for m in MEASURES if any(getattr(one, m) for one in evaluation.candidates))
    return next(found, None)


def draw_accuracy(form: Form, evaluation: Evaluation, measure: Measure) -> Figure:
    """A measure of each model with its range, and the same against MACs."""
    candidates = [one for one in evaluation.candidates if getattr(one, measure)]
    height = max(2.4, 0.9 + 0.36 * len(candidates))
    figure, (by_name, by_macs) = panels(form, 2, height, narrow_height=height)
    largest = max(one.macs for one in candidates)
    scale, unit = macs_unit(largest)
    rest = itertools.cycle(REST)
    for y, one in enumerate(candidates):
        look = bars(*(CANDIDATES[one.name] if one.name in CANDIDATES else next(rest)))
        value, low, high = _range(one, measure)
        error = reach([value], [low], [high])
        by_name.errorbar([value], [y], xerr=error, **look)
        by_macs.errorbar([one.macs / scale], [value], yerr=error, **look)
    by_name.set_yticks(range(len(candidates)), [f"{one.name}, {one.backend}" for one in candidates])
    by_name.set_ylim(len(candidates) - 0.5, -0.5)
    named_rows(by_name)
    by_name.locator_params(axis="x", nbins=5)
    by_name.set_xlabel(MEASURES[measure])
    by_macs.set_xlabel(f"{unit} per image")
    by_macs.set_ylabel(MEASURES[measure])
    by_macs.set_xlim(0, largest / scale * 1.12)
    return figure


def _range(one: CandidateResult, measure: Measure) -> tuple[float, float, float]:
    """Value, lower and upper end of its range, as the axis has them."""
    found = getattr(one, measure)
    if isinstance(found, Share):
        return 100 * found.share, 100 * found.low, 100 * found.high
    if isinstance(found, Deviations):
        return found.mean, found.mean, found.max
    return found.mean, found.min, found.mean


def efficient(front: Iterable[TunedPoint], cost: str = "macs") -> list[TunedPoint]:
    """The points than which none costs less (``macs`` or ``latency_ms``) and is as good."""
    found: list[TunedPoint] = []
    for point in sorted(front, key=lambda p: (getattr(p, cost), -p.counted)):
        if not found or point.counted > found[-1].counted:
            found.append(point)
    return found


def draw_front(form: Form, search: TunedSchedule, metric: str, timed: bool) -> Figure:
    """What is counted against MACs, and against latency where all points have one."""
    short = "similarity" if search.objective.metric == "similarity" else "accuracy (%)"
    wide = metric if short == "similarity" else f"{metric} (%)"
    figure, axes = panels(form, 1 + timed, 3.3, narrow_height=2.9)
    largest = max(search.unmerged.macs, *(point.macs for point in search.front))
    scale, unit = macs_unit(largest)
    _scatter(axes[0], search, "macs", scale)
    axes[0].set_xlabel(f"{unit} per image")
    if timed:
        _scatter(axes[1], search, "latency_ms", 1.0)
        axes[1].set_xlabel("latency (ms)")
    for one in axes:
        one.set_ylabel(wide if form == "wide" else short)
    legend(figure, axes[0], form)
    return figure


def _scatter(axes: Axes, search: TunedSchedule, cost: str, scale: float) -> None:
    unit = 1 if search.objective.metric == "similarity" else 100

    def placed(points: Sequence[TunedPoint]) -> tuple[list[float], list[float]]:
        return [getattr(p, cost) / scale for p in points], [unit * p.counted for p in points]

    line = placed(efficient(search.front, cost))
    axes.plot(*line, color=GREY, linewidth=1.1, drawstyle="steps-post")
    for method in dict.fromkeys(point.method for point in search.front):
        colour, marker = METHODS[method]
        shown = placed([point for point in search.front if point.method == method])
        axes.scatter(*shown, 26, color=colour, marker=marker, label=method, zorder=3)
    chosen = [point for point in search.front if point.chosen]
    if chosen:
        ring(axes, *placed(chosen))
    plain = getattr(search.unmerged, cost)
    if plain is not None:
        counted = [unit * search.unmerged.counted]
        axes.scatter([plain / scale], counted, 30, color=GREY, marker="s", label="unmerged")


def draw_cascade(form: Form, cascade: Cascade, metric: str) -> Figure:
    """Members with their intervals, the sweep as a line, the chosen setting ringed."""
    figure, (axes,) = panels(form, 1, 3.6, narrow_height=3.1)
    scale, unit = macs_unit(max(one.macs for one in cascade.members))
    similar = cascade.metric == "similarity"
    unit_share = 1 if similar else 100
    line = sorted((one.test.macs / scale, unit_share * one.test.share) for one in cascade.sweep)
    axes.plot(*np.array(line).T, "-D", color=VERMILLION, ms=3.5, label=cascade.policy)
    alone = [(one.test.share, one.test.low, one.test.high) for one in cascade.members]
    share, low, high = unit_share * np.array(alone).T
    cost = [one.macs / scale for one in cascade.members]
    error = reach(share, low, high)
    axes.errorbar(cost, share, yerr=error, label="one artifact for all", **bars(BLUE))
    chosen = cascade.chosen.test
    ring(axes, [chosen.macs / scale], [unit_share * chosen.share])
    axes.set_xlabel(f"mean {unit} per image")
    short = "similarity" if similar else "accuracy (%)"
    wide = metric if similar else f"{metric} (%)"
    axes.set_ylabel(wide if form == "wide" else short)
    legend(figure, axes, form)
    return figure
