"""What ``bench`` found, as lines of text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tome_export.cli.output import size, table

NOTHING = "-"


def bench_lines(found: Mapping[str, Any]) -> list[str]:
    """Results, then the profiles, then what a user should know.

    Args:
        found: The content of ``bench.json``.
    """
    machine = found["environment"]
    device = f", {machine['gpu']}" if machine["gpu"] else ""
    lines = [
        f"Machine: {machine['cpu']}, {machine['cores']} cores{device}",
        f"Against: {found['against']}, {found['rounds']} rounds after {found['warmup']} to warm "
        f"up, on {found['images']}",
        "Latency is the median of the rounds, speed-up that of their ratios [20th to 80th "
        "percentile]",
        "",
        *row_lines(found["rows"], found["macs_ratio"]),
    ]
    for profile in found["profile"]:
        lines += ["", *profile_lines(profile)]
    return [*lines, *([""] if found["notes"] else []), *found["notes"]]


def row_lines(rows: Sequence[Mapping[str, Any]], macs_ratio: float) -> list[str]:
    """One line per backend and batch."""
    headers = (
        "backend",
        "batch",
        "merged ms",
        "against ms",
        "images/s",
        "against",
        "speed-up",
        "MACs ratio",
        "of limit",
        "memory",
        "against",
    )
    cells = []
    for row in rows:
        merged, against, speedup = row["merged"], row["against"], row["speedup"]
        cells.append(
            (
                row["backend"],
                row["batch"],
                f"{merged['latency_ms']['p50']:.2f}",
                f"{against['latency_ms']['p50']:.2f}",
                f"{merged['throughput']:.1f}",
                f"{against['throughput']:.1f}",
                f"{speedup['p50']:.2f} [{speedup['p20']:.2f}-{speedup['p80']:.2f}]",
                f"{macs_ratio:.2f}",
                f"{100 * row['share_of_macs_limit']:.0f} %",
                _bytes(merged["peak_memory_bytes"]),
                _bytes(against["peak_memory_bytes"]),
            )
        )
    return table(headers, cells, "l" + "r" * (len(headers) - 1))


def profile_lines(profile: Mapping[str, Any]) -> list[str]:
    """Time by group of both models, and the share of merging."""
    merged, against = profile["merged"], profile["against"]
    groups = {**merged["groups_ms"], **against["groups_ms"]}
    cells = []
    for group in groups:
        row: list[str] = [group]
        for side in (merged, against):
            value = side["groups_ms"].get(group)
            share = None if value is None else value / side["total_ms"]
            row += [
                NOTHING if value is None else f"{value:.2f}",
                NOTHING if share is None else f"{100 * share:.1f}",
            ]
        cells.append(row)
    cells.append(["all nodes", *_total(merged), *_total(against)])
    between = [f"{side['run_ms'] - side['total_ms']:.2f}" for side in (merged, against)]
    cells.append(["between nodes", between[0], "", between[1], ""])
    merging = sum(merged["groups_ms"].get(group, 0.0) for group in ("match", "merge"))
    return [
        f"Where the time goes, {profile['backend']}, batch {profile['batch']}:",
        *table(("group", "merged ms", "%", "against ms", "%"), cells, "lrrrr"),
        f"match + merge: {100 * merging / merged['total_ms']:.1f} % of the time",
        f"{100 * profile['attributed_share']:.1f} % of the nodes' time is in named groups; between "
        "nodes is what a profiled run takes beside them, the profiler's own time included",
    ]


def _total(side: Mapping[str, Any]) -> tuple[str, str]:
    return f"{side['total_ms']:.2f}", "100.0"


def _bytes(count: int | None) -> str:
    return NOTHING if count is None else size(count)
