"""The head of the page: what was built, and the four figures that decide."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tome_export.artifact import Manifest
from tome_export.report.accuracy import AGREEMENT, COSINE, candidate, change_of, measure_of
from tome_export.report.numbers import TIMES, counted, fixed, percent, points, span, times
from tome_export.report.speed import against

RANDOM = (
    "This model has learned nothing: sizes, speed and parity are real, its predictions, accuracy "
    "and pictures mean nothing."
)


@dataclass(frozen=True)
class Figure:
    """One of the figures.

    Attributes:
        name: What it is.
        value: The figure.
        note: What it was found on.
        tone: ``bad`` where something is wrong, ``none`` where there is no figure.
    """

    name: str
    value: str
    note: str
    tone: str = ""


@dataclass(frozen=True)
class Headline:
    """The head of the page.

    Attributes:
        model: Its name.
        description: In a line.
        facts: Names and values.
        figures: MACs, speed, parity, accuracy.
        random: Said of random weights; None for others.
    """

    model: str
    description: str
    facts: tuple[tuple[str, str], ...]
    figures: tuple[Figure, ...]
    random: str | None


def headline(manifest: Manifest, reports: Mapping[str, Mapping[str, Any]]) -> Headline:
    """The head of the page.

    Args:
        manifest: The content of ``build.json``.
        reports: Reports by command.
    """
    model, merge = manifest.model, manifest.merge
    per_layer = ", ".join(map(str, merge["r"]))
    schedule = merge["schedule"]
    if schedule.replace(",", ", ") != per_layer:
        schedule = f"{schedule} ({per_layer})"
    else:
        schedule = per_layer
    facts = (
        ("Tokens merged per layer", schedule),
        ("Precision", manifest.precision),
        ("Weights", f"{model['weights']['kind']}: {model['weights']['source']}"),
        ("Proportional attention", "on" if merge["prop_attn"] else "off"),
        ("Merge op", merge["merge_op"]),
        ("Batch", manifest.batch),
    )
    figures = (
        _macs(manifest),
        _speed(reports.get("bench")),
        _parity(reports.get("check"), manifest.parity),
        _accuracy(reports.get("eval")),
    )
    random = RANDOM if model["random_weights"] else None
    return Headline(model["name"], model["description"], facts, figures, random)


def _macs(manifest: Manifest) -> Figure:
    total = manifest.macs
    if not total:
        return Figure("MACs", "unknown", "not in the artifact", "none")
    return Figure("MACs, unmerged over merged", times(total["ratio"]), "counted per image")


def _speed(report: Mapping[str, Any] | None) -> Figure:
    name = "Speed-up, measured"
    if report is None or not report["rows"]:
        return Figure(name, "not measured", "no bench.json", "none")
    backend = report["rows"][0]["backend"]
    rows = [row for row in report["rows"] if row["backend"] == backend]
    found = sorted(row["speedup"]["p50"] for row in rows)
    low, high = times(found[0]), times(found[-1])
    value = high if low == high else span(low.rstrip(TIMES), high)
    batches = ", ".join(str(row["batch"]) for row in rows)
    return Figure(name, value, f"over {against(report)}; {backend}, batch {batches}")


def _parity(report: Mapping[str, Any] | None, summary: Mapping[str, Any] | None) -> Figure:
    name = "Parity with PyTorch"
    if report is None or not report["checks"]:
        if summary is None:
            return Figure(name, "not checked", "no parity.json", "none")
        report = {"checks": [summary]}
    checks = report["checks"]
    defects = sum(check["defects"] for check in checks)
    decisions = sum(check["decisions"] for check in checks)
    note = f"{counted(defects, 'defect')} in {counted(decisions, 'decision')}"
    if all(check["passed"] for check in checks):
        return Figure(name, "passed", note)
    return Figure(name, "FAILED", note, "bad")


def _accuracy(report: Mapping[str, Any] | None) -> Figure:
    merged, unmerged = candidate(report, "merged"), candidate(report, "unmerged")
    measure = measure_of(report)
    if report is None or merged is None:
        return Figure("Top-1, change by merging", "not evaluated", "no eval.json", "none")
    images = counted(report["data"]["images"], "image")
    missing = merged.get("not_finite") or 0
    if missing:
        note = f"of {images} without finite numbers"
        return Figure("Outputs of the merged model", f"{missing:,} NOT FINITE", note, "bad")
    found = merged.get(measure.key) if measure else None
    if measure is None or found is None:
        return Figure("Accuracy", "not known", f"{images} without labels", "none")
    if measure is AGREEMENT:
        return Figure("As the unmerged model", percent(found["share"], 2), f"of {images}")
    if measure is COSINE:
        note = f"mean of {images}, smallest {fixed(found['min'], 4)}"
        return Figure("Cosine to unmerged", fixed(found["mean"], 4), note)
    share = percent(found["share"], 2)
    change = change_of(merged, unmerged)
    if change is None:
        return Figure("Top-1, merged", share, f"on {images}")
    between = f" ({_span_of(change)})" if "low" in change else ""
    note = f"points{between}, to {share} on {images}"
    return Figure("Top-1, change by merging", points(change["share"]), note)


def _span_of(change: Mapping[str, Any]) -> str:
    """The interval of a change, in points."""
    return f"{points(change['low'])} to {points(change['high'])}"
