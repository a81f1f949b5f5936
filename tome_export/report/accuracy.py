"""The section on accuracy: top-1 of labelled images, else how near merging stays to the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tome_export.artifact.files import utf8
from tome_export.report.accuracy_chart import Measure, draw_accuracy
from tome_export.report.numbers import NONE, counted, fixed, macs, percent, points, span
from tome_export.report.parts import Block, Drawing, Section, Table, Text
from tome_export.report.plot import chart

TITLE = "Accuracy"

LISTED = 20
"""Unreadable images that are listed; all are counted."""

TOP1 = Measure("top1", "top-1 accuracy", "top-1 accuracy")
AGREEMENT = Measure("agreement_with_unmerged", "agreement with the unmerged model", "agreement")
COSINE = Measure("cosine_to_unmerged", "cosine to the unmerged model", "cosine")

Candidate = Mapping[str, Any]


def accuracy_section(report: Mapping[str, Any] | None, folder: str) -> Section:
    """What was evaluated of every candidate with its interval, and against MACs."""
    if report is None or not report["candidates"]:
        return Section(
            "accuracy",
            TITLE,
            command=f"tome-export eval {folder} --data FOLDER",
            adds="top-1 and top-5 accuracy on your images",
        )
    data, candidates = report["data"], report["candidates"]
    level = percent(report["confidence"], 0)
    measure = measure_of(report)
    lead = f"On {counted(data['images'], 'image')} of {name_of(data['source'])}. "
    blocks: list[Block] = [Text(lead + _explained(measure, level))]
    blocks += [
        Text(
            f"{one['name']} on {one['backend']} gave no finite numbers for "
            f"{counted(one['not_finite'], 'image')}.",
            "bad",
        )
        for one in candidates
        if one.get("not_finite")
    ]
    if measure is not None:
        shown = [one for one in candidates if one.get(measure.key)]
        blocks.append(
            Drawing(
                chart(
                    "accuracy",
                    _caption(measure, level),
                    lambda form: draw_accuracy(form, shown, measure),
                )
            )
        )
    blocks += [_table(candidates), *_unreadable(data)]
    return Section("accuracy", TITLE, tuple(blocks))


def measure_of(report: Mapping[str, Any] | None) -> Measure | None:
    """What there is to show of an evaluation: labels come before all else."""
    candidates = (report or {}).get("candidates", ())
    return next(
        (m for m in (TOP1, AGREEMENT, COSINE) if any(c.get(m.key) for c in candidates)), None
    )


def name_of(source: str) -> str:
    """The last part of a path: the rest is about somebody's machine."""
    return utf8(source.rstrip("/").rpartition("/")[2] or source).decode()


def candidate(report: Mapping[str, Any] | None, name: str) -> Candidate | None:
    """A candidate by its name."""
    found = (c for c in (report or {}).get("candidates", ()) if c["name"] == name)
    return next(found, None)


def change_of(one: Candidate, plain: Candidate | None) -> Mapping[str, Any] | None:
    """Top-1 of a candidate minus that of the unmerged model, with its interval if there is one."""
    paired = one.get("difference_to_unmerged")
    if paired is not None or plain is None or not (one.get("top1") and plain.get("top1")):
        return paired
    return {"share": one["top1"]["share"] - plain["top1"]["share"]}


def change_text(change: Mapping[str, Any] | None) -> str:
    """A change in points, with its interval if it has one."""
    if change is None:
        return NONE
    if "low" not in change:
        return points(change["share"])
    return f"{points(change['share'])} ({points(change['low'])} to {points(change['high'])})"


def _explained(measure: Measure | None, level: str) -> str:
    if measure is None:
        return (
            "They have no labels, and no other model was run to compare with: all there is to tell "
            "is what was run."
        )
    if measure is COSINE:
        return (
            "The model has no classes: what can be told is the cosine of an image's features to "
            "those of the unmerged model, 1 where they are the same."
        )
    if measure is AGREEMENT:
        return (
            "They have no labels: what can be told is on how many of them a model's best class is "
            f"that of the unmerged model. Ranges are {level} confidence intervals."
        )
    return (
        f"Ranges are {level} confidence intervals. That of a change is for the same images under "
        "both models; those of the shares say what another sample of as many images might give, "
        "and overlap more."
    )


def _caption(measure: Measure, level: str) -> str:
    name = f"{measure.title[:1].upper()}{measure.title[1:]}"
    range_of = (
        "mean, with a line to the smallest"
        if measure is COSINE
        else f"with its {level} confidence interval"
    )
    return f"{name} of each candidate, {range_of}, and the same against MACs per image."


def _share(found: Mapping[str, Any] | None) -> str:
    return percent(found["share"], 2) if found else NONE


def _interval(found: Mapping[str, Any] | None) -> str:
    return span(f"{100 * found['low']:.2f}", percent(found["high"], 2)) if found else NONE


def _table(candidates: Sequence[Candidate]) -> Table:
    """A row per candidate; columns without a single figure are left out."""
    plain = next((c for c in candidates if c["name"] == "unmerged"), None)
    changes = [None if one is plain else change_of(one, plain) for one in candidates]
    top1, top5, agreement, cosine = (
        [one.get(key) for one in candidates]
        for key in ("top1", "top5", "agreement_with_unmerged", "cosine_to_unmerged")
    )
    missing = [one.get("not_finite") or 0 for one in candidates]
    columns: list[tuple[str, Sequence[Any], Sequence[str]]] = [
        ("top-1", top1, [_share(found) for found in top1]),
        ("interval", top1, [_interval(found) for found in top1]),
        (
            "change, points",
            changes,
            [
                "" if c is plain else change_text(d)
                for c, d in zip(candidates, changes, strict=True)
            ],
        ),
        ("top-5", top5, [_share(found) for found in top5]),
        ("as unmerged", agreement, [_share(found) for found in agreement]),
        ("interval of it", [] if any(top1) else agreement, [_interval(f) for f in agreement]),
        ("cosine, mean", cosine, [fixed(found["mean"], 6) if found else NONE for found in cosine]),
        ("smallest", cosine, [fixed(found["min"], 6) if found else NONE for found in cosine]),
        ("not finite", missing, [str(count) for count in missing]),
    ]
    shown = [(header, cells) for header, found, cells in columns if any(found)]
    rows = [
        (one["name"], one["backend"], macs(one["macs"]), *(cells[index] for _, cells in shown))
        for index, one in enumerate(candidates)
    ]
    headers = ("model", "backend", "MACs", *(header for header, _ in shown))
    return Table("Accuracy of every model", headers, rows, "ll" + "r" * (len(headers) - 2))


def _unreadable(data: Mapping[str, Any]) -> list[Block]:
    bad = data.get("unreadable") or []
    count = data.get("unreadable_count") or len(bad)
    if not count:
        return []
    shown = bad[:LISTED]
    more = "" if len(shown) == count else f" {len(shown)} of them:"
    rows = [(one["name"], one["reason"]) for one in shown]
    return [
        Text(f"Left out, as they could not be read: {counted(count, 'image')}.{more}"),
        Table("Images that could not be read", ("image", "reason"), rows, "ll"),
    ]
