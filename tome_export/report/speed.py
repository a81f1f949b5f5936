"""The section on latency and throughput, and on where the time goes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from tome_export.artifact.bench import Bench, BenchProfile, BenchRow, Quantiles
from tome_export.display import TIMES, counted, fixed, milliseconds, percent, size, times
from tome_export.report.parts import Block, Section, Table, Text
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
    chart,
    legend,
    named_rows,
    panels,
    reach,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

TITLE = "Latency and throughput"

OTHER = "other"
"""What belongs to no group; plain grey, and last."""

COLOURS = {
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

Groups = Mapping[str, float]


def speed_section(bench: Bench | None, folder: str) -> Section:
    """Merged against unmerged, and against what the MACs allow; where the time goes."""
    if bench is None or not bench.rows:
        return Section(
            "speed",
            TITLE,
            command=f"tome-export bench {folder}",
            adds="latency, throughput and where the time goes",
        )
    other, machine, ratio = against(bench), bench.environment, times(bench.macs_ratio)
    where = ", ".join(name for name in (machine.gpu, machine.cpu) if name)
    lead = (
        f"Against {'the unmerged model' if other == 'unmerged' else other} on {where} "
        f"({counted(machine.cores, 'core')}), {counted(bench.rounds, 'paired round')} each. The "
        f"MACs of the two differ by {ratio}, the limit for a speed-up by fewer matrix products "
        "alone; whatever else shrinks with the tokens can add to it."
    )
    caption = (
        f"Latency of a batch, median with 20th to 80th percentile, merged and {other}; and the "
        f"speed-up of each, with the ratio of MACs, {ratio}, as a line."
    )
    blocks: list[Block] = [Text(lead), chart("speed", caption, lambda form: _draw(form, bench))]
    blocks.append(_table(bench.rows, other))
    for index, profile in enumerate(bench.profile):
        blocks += _profile(index, profile, other)
    return Section("speed", TITLE, blocks)


def against(bench: Bench) -> str:
    """What the artifact was measured against, without the folders it lies in."""
    return bench.against.rstrip("/").rpartition("/")[2] or "unmerged"


def _table(rows: Sequence[BenchRow], other: str) -> Table:
    lines = []
    for row in rows:
        for label, timed in (("merged", row.merged), (other, row.against)):
            latency, first = timed.latency_ms, timed is row.merged
            lines.append(
                (
                    row.backend,
                    row.batch,
                    label,
                    *(milliseconds(value) for value in (latency.p20, latency.p50, latency.p80)),
                    fixed(timed.throughput, 1),
                    size(timed.peak_memory_bytes),
                    times(row.speedup.p50) if first else "",
                    percent(row.share_of_macs_limit, 0) if first else "",
                )
            )
    headers = ["backend", "batch", "model", "p20 ms", "p50 ms", "p80 ms", "images/s"]
    headers += ["peak memory", "speed-up", "of the MACs limit"]
    return Table("Latency, throughput and memory", headers, lines, "lrlrrrrrrr")


def _draw(form: Form, bench: Bench) -> Figure:
    rows = bench.rows
    height = 0.9 + 0.5 * len(rows)
    figure, (latency, speedup) = panels(form, 2, max(2.2, height), narrow_height=max(1.9, height))
    y = np.arange(len(rows))
    for offset, timed, colour, label in (
        (-0.2, [row.against for row in rows], GREY, against(bench)),
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
    joint = "\n" if form.wide else ", "
    several = len({row.backend for row in rows}) > 1
    names = [f"{row.backend + joint if several else ''}batch {row.batch}" for row in rows]
    for axes in (latency, speedup):
        named_rows(axes)
        axes.set_ylim(len(rows) - 0.45, -0.55)
        axes.set_yticks(y, names)
    speedup.spines["left"].set_visible(False)
    if form.wide:
        speedup.set_yticklabels([])
    legend(figure, latency, form, [*latency.get_legend_handles_labels()[0], line])
    return figure


def _quantiles(found: Iterable[Quantiles]) -> NDArray[np.float64]:
    """20th, 50th and 80th percentiles ``[3, B]``."""
    rows: NDArray[np.float64] = np.array([(one.p20, one.p50, one.p80) for one in found]).T
    return rows


def _profile(index: int, profile: BenchProfile, other: str) -> Iterator[Block]:
    """A stacked bar per model, and the same as a table."""
    models = {other: profile.against.groups_ms, "merged": profile.merged.groups_ms}
    found = dict.fromkeys(group for groups in models.values() for group in groups)
    known = [group for group in COLOURS if group in found and group != OTHER]
    rest = [group for group in found if group not in COLOURS]
    groups = [*known, *rest, *([OTHER] if OTHER in found else [])]
    total = sum(models["merged"].values())
    merging = sum(models["merged"].get(name, 0.0) for name in ("match", "merge"))
    place = f"on {profile.backend}, batch {profile.batch}"
    yield Text(
        f"Where the time goes {place}, by the runtime's own profiler: "
        f"{percent(profile.attributed_share)} of {milliseconds(profile.total_ms)} ms is attributed "
        f"to {counted(len(groups), 'named group')}."
        + (f" Matching and merging take {percent(merging / total)} of it." if total else "")
    )
    caption = f"Time per run in each part of the model, stacked: {', '.join(models)}, {place}."
    yield chart(f"profile{index}", caption, lambda form: _draw_profile(form, models, groups))
    rows, totals = [], {name: sum(times_of.values()) for name, times_of in models.items()}
    for group in groups:
        row = [group]
        for name, times_of in models.items():
            value = times_of.get(group)
            share = None if value is None or not totals[name] else value / totals[name]
            row += [milliseconds(value), percent(share)]
        rows.append(row)
    headers = ["part", *(text for name in models for text in (f"{name} ms", "share"))]
    yield Table("Time in each part of the model", headers, rows)


def _draw_profile(form: Form, models: Mapping[str, Groups], groups: Sequence[str]) -> Figure:
    figure, (axes,) = panels(form, 1, 1.25 + 0.42 * len(models), narrow_height=2.5)
    rest = iter(HATCHES * (1 + len(groups) // len(HATCHES)))
    left = np.zeros(len(models))
    for group in groups:
        hatch = "" if group in COLOURS else next(rest)
        widths = [groups_ms.get(group, 0.0) for groups_ms in models.values()]
        style: Any = {"color": COLOURS.get(group, GREY), "hatch": hatch, "label": group}
        style["edgecolor"] = RULE if hatch else "none"
        axes.barh(list(models), widths, 0.62, left=left, **style)
        left += widths
    named_rows(axes)
    axes.invert_yaxis()
    axes.set_xlabel("time per run (ms)")
    legend(figure, axes, form)
    return figure
