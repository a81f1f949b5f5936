"""The section on latency and throughput."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from tome_export.report.numbers import TIMES, counted, fixed, milliseconds, percent, size, times
from tome_export.report.parts import Block, Drawing, Section, Table, Text
from tome_export.report.plot import BLUE, GREY, INK, VERMILLION, Form, chart, legend, panels
from tome_export.report.profile import profile_blocks

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TITLE = "Latency and throughput"


def speed_section(report: Mapping[str, Any] | None, folder: str) -> Section:
    """Merged against unmerged, and against what the MACs allow; where the time goes."""
    if report is None or not report["rows"]:
        return Section(
            "speed",
            TITLE,
            command=f"tome-export bench {folder}",
            adds="latency, throughput and where the time goes",
        )
    rows, other = report["rows"], against(report)
    environment = report.get("environment") or {}
    where = ", ".join(str(environment[key]) for key in ("gpu", "cpu") if environment.get(key))
    cores = f" ({counted(environment['cores'], 'core')})" if environment.get("cores") else ""
    rounds = f", {counted(report['rounds'], 'paired round')} each" if report.get("rounds") else ""
    lead = (
        f"Against {'the unmerged model' if other == 'unmerged' else other}"
        f"{f' on {where}{cores}' if where else ''}{rounds}. The MACs of the two differ by "
        f"{times(report['macs_ratio'])}, the limit for a speed-up by fewer matrix products alone; "
        "whatever else shrinks with the tokens can add to it."
    )
    caption = (
        f"Latency of a batch, median with 20th to 80th percentile, merged and {other}; and the "
        f"speed-up of each, with the ratio of MACs, {times(report['macs_ratio'])}, as a line."
    )
    blocks: list[Block] = [
        Text(lead),
        Drawing(chart("speed", caption, lambda form: _draw(form, report))),
        _table(rows, other),
    ]
    return Section("speed", TITLE, (*blocks, *profile_blocks(report.get("profile") or (), other)))


def against(report: Mapping[str, Any]) -> str:
    """What the artifact was measured against, without the folders it lies in."""
    return str(report["against"]).rstrip("/").rpartition("/")[2] or "unmerged"


def _table(rows: Sequence[Mapping[str, Any]], other: str) -> Table:
    lines = []
    for row in rows:
        for label, timed in (("merged", row["merged"]), (other, row["against"])):
            latency, first = timed["latency_ms"], label == "merged"
            lines.append(
                (
                    row["backend"],
                    row["batch"],
                    label,
                    *(milliseconds(latency[key]) for key in ("p20", "p50", "p80")),
                    fixed(timed["throughput"], 1),
                    size(timed.get("peak_memory_bytes")),
                    times(row["speedup"]["p50"]) if first else "",
                    percent(row["share_of_macs_limit"], 0) if first else "",
                )
            )
    headers = (
        "backend",
        "batch",
        "model",
        "p20 ms",
        "p50 ms",
        "p80 ms",
        "images/s",
        "peak memory",
        "speed-up",
        "of the MACs limit",
    )
    return Table("Latency, throughput and memory", headers, lines, "lrlrrrrrrr")


def _labels(rows: Sequence[Mapping[str, Any]], form: Form) -> list[str]:
    one = len({row["backend"] for row in rows}) == 1
    if one:
        return [f"batch {row['batch']}" for row in rows]
    joint = "\n" if form.wide else ", "
    return [f"{row['backend']}{joint}batch {row['batch']}" for row in rows]


def _draw(form: Form, report: Mapping[str, Any]) -> Figure:
    rows = report["rows"]
    height = 0.9 + 0.5 * len(rows)
    figure, (latency, speedup) = panels(form, 2, max(2.2, height), narrow_height=max(1.9, height))
    y = np.arange(len(rows))
    series = ((-0.2, "against", GREY, against(report)), (0.2, "merged", BLUE, "merged"))
    for offset, key, colour, label in series:
        p20, p50, p80 = (
            np.array([row[key]["latency_ms"][name] for row in rows])
            for name in ("p20", "p50", "p80")
        )
        spread = np.maximum([p50 - p20, p80 - p50], 0)
        latency.barh(y + offset, p50, 0.36, color=colour, label=label)
        latency.errorbar(
            p50, y + offset, xerr=spread, fmt="none", ecolor=INK, elinewidth=0.9, capsize=2
        )
    ratios = [row["speedup"] for row in rows]
    middle = np.array([ratio["p50"] for ratio in ratios])
    low, high = (np.array([ratio[key] for ratio in ratios]) for key in ("p20", "p80"))
    speedup.errorbar(
        middle,
        y,
        xerr=np.maximum([middle - low, high - middle], 0),
        fmt="o",
        color=BLUE,
        ecolor=BLUE,
        elinewidth=1.2,
        capsize=3,
    )
    limit = report["macs_ratio"]
    line = speedup.axvline(
        limit, color=VERMILLION, linestyle=(0, (4, 2)), linewidth=1.3, label="MACs limit"
    )
    speedup.axvline(1, color=GREY, linewidth=0.9)
    speedup.set_xlim(min(0.9, float(low.min()) * 0.95), max(limit, float(high.max())) * 1.08)
    latency.set_xlabel("latency of a batch (ms)")
    speedup.set_xlabel(f"speed-up ({TIMES})")
    for axes in (latency, speedup):
        axes.grid(visible=True, axis="x")
        axes.grid(visible=False, axis="y")
        axes.set_ylim(len(rows) - 0.45, -0.55)
        axes.set_yticks(y, _labels(rows, form))
        axes.tick_params(axis="y", length=0)
    speedup.spines["left"].set_visible(False)
    if form.wide:
        speedup.set_yticklabels([])
    legend(figure, latency, form, [*latency.get_legend_handles_labels()[0], line])
    return figure
