"""A tuned schedule and its Pareto front as lines of text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tome_export.cli.output import fields, macs, percent, table
from tome_export.cli.text import RANDOM
from tome_export.reducers import DEFAULT

ROWS = 6
"""Most rows of each method, besides the chosen one."""


def schedule_lines(values: Mapping[str, Any], path: Path) -> list[str]:
    """All a person wants to know of a search."""
    found, unmerged, data = values["found"], values["unmerged"], values["data"]
    images = f"{data['search']} to search"
    images += f", {data['validation']} to choose" if data["validation"] else ", none to choose"
    images += f", {data['held_out']} held out" if data["held_out"] else ""
    return [
        *([RANDOM] if values["weights"]["kind"] == "random" else []),
        *fields(
            [
                ("Model", values["model"]),
                *([] if (name := values["reducer"]["name"]) == DEFAULT else [("Reducer", name)]),
                ("Target", values["objective"]["text"]),
                ("Images", f"{values['images']} of {data['source']}: {images}"),
                ("Schedule", ",".join(map(str, found["schedule"]))),
                *_facts(found, unmerged, values["objective"]["metric"]),
                *_entropy(found, values["search"]),
                *_estimate(found["estimate"], values["confidence"]),
                *_latency(found, unmerged, values["cost_table"]),
                ("Best constant r", _constant(values["best_constant"], unmerged)),
            ]
        ),
        "",
        *front_lines(values),
        "",
        f"{values['search']['schedules']} schedules were searched in {values['seconds']:.0f} s"
        + (", ended by the time limit" if values["search"]["ended_by_time_limit"] else "")
        + f"; {values['search']['validation_looks']} were looked at on the images to choose with",
        *(f"Note: {note}" for note in data["notes"]),
        f"Schedule: {path}; build it with --schedule {path}",
    ]


def _facts(
    found: Mapping[str, Any], unmerged: Mapping[str, Any], metric: str
) -> list[tuple[str, str]]:
    parts = f"search {percent(found['search_accuracy'])}"
    if found["validation_accuracy"] is not None:
        parts += f", choice {percent(found['validation_accuracy'])}"
    return [
        ("MACs", f"{macs(found['macs'])}, {_share(found, unmerged)} of the unmerged model's"),
        (
            "Top-1" if metric == "top1" else "Agreement",
            f"{percent(found['accuracy'])} ({parts}), unmerged {percent(unmerged['accuracy'])}",
        ),
    ]


def _entropy(found: Mapping[str, Any], search: Mapping[str, Any]) -> list[tuple[str, str]]:
    """How much the schedule merges its worst image, and how many were left out for that."""
    asked = search["min_entropy"]
    left_out = ""
    if asked is not None:
        left_out = f"; {search['over_merged']} schedules fell under {asked:g} and were left out"
    return [("Entropy", f"{found['entropy']:.4f} on the search image with the least{left_out}")]


def _estimate(estimate: Mapping[str, Any] | None, confidence: float) -> list[tuple[str, str]]:
    """What to expect of images that are not here; the label says which images tell."""
    if estimate is None:
        return [("Elsewhere", "unknown: all images were searched on")]
    held_out = estimate["on"] == "held out"
    change = estimate["change"]
    why = "" if held_out else "; optimistic, the schedule was chosen with them"
    return [
        (
            "Held out" if held_out else "Choice",
            f"{percent(estimate['share'])} of {estimate['images']}, unmerged "
            f"{percent(estimate['unmerged']['share'])}: {100 * change['share']:+.2f} points, "
            f"{100 * confidence:g} % interval {100 * change['low']:+.2f} to "
            f"{100 * change['high']:+.2f}{why}",
        )
    ]


def _latency(
    found: Mapping[str, Any], unmerged: Mapping[str, Any], costs: Mapping[str, Any]
) -> list[tuple[str, str]]:
    if found["latency_ms"] is None:
        return []
    return [
        (
            "Latency",
            f"{found['latency_ms']:.3g} ms measured, {found['predicted_latency_ms']:.3g} ms "
            f"predicted; unmerged {unmerged['latency_ms']:.3g} ms (batch {costs['batch']}, "
            f"{costs['precision']}, ONNX Runtime CPU)",
        ),
        ("Cost table", f"{costs['measurements']} schedules, residual {percent(costs['residual'])}"),
    ]


def _constant(constant: Mapping[str, Any] | None, unmerged: Mapping[str, Any]) -> str:
    if constant is None:
        return "none was found that meets the target"
    r = ",".join(map(str, constant["schedule"]))
    return (
        f"{r}: {macs(constant['macs'])} MACs, {_share(constant, unmerged)}, "
        f"{percent(constant['accuracy'])}"
    )


def front_lines(values: Mapping[str, Any]) -> list[str]:
    """The Pareto front as a table, cheapest first; the chosen schedule is marked."""
    unmerged = values["unmerged"]
    latency = any(row["latency_ms"] is not None for row in values["front"])
    rows = [
        (
            "*" if row["chosen"] else "",
            row["method"],
            macs(row["macs"]),
            _share(row, unmerged),
            *([f"{row['latency_ms']:.3g}"] if latency else []),
            percent(row["accuracy"]),
            ",".join(map(str, row["schedule"])),
        )
        for row in thinned(values["front"])
    ]
    timed = ["ms"] if latency else []
    metric = "top-1" if values["objective"]["metric"] == "top1" else "agreement"
    headers = ["", "method", "MACs", "of unmerged", *timed, metric, "r per layer"]
    return table(headers, rows, "ll" + "rr" + "r" * len(timed) + "rl")


def thinned(front: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """At most ``ROWS`` of each method, evenly; the chosen one always."""
    kept: list[Mapping[str, Any]] = []
    for method in dict.fromkeys(row["method"] for row in front):
        kept += spread([row for row in front if row["method"] == method], ROWS)
    return sorted(kept, key=lambda row: int(row["macs"]))


def spread(rows: Sequence[Mapping[str, Any]], most: int) -> list[Mapping[str, Any]]:
    """At most so many rows, evenly, and the chosen one."""
    step = max(1.0, (len(rows) - 1) / (most - 1))
    index = {round(step * i) for i in range(most)}
    return [row for i, row in enumerate(rows) if i in index or row["chosen"]]


def _share(row: Mapping[str, Any], unmerged: Mapping[str, Any]) -> str:
    return f"{100 * row['macs'] / unmerged['macs']:.1f} %"
