"""The section on accuracy."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from tome_export.report.numbers import NONE, counted, macs, macs_unit, percent, points, span
from tome_export.report.parts import Block, Drawing, Section, Table, Text
from tome_export.report.plot import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PURPLE,
    SKY,
    VERMILLION,
    Form,
    chart,
    panels,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TITLE = "Accuracy"

STYLES = {"merged": (BLUE, "o"), "unmerged": (GREY, "s")}
"""Colour and marker of the two models that every evaluation has."""

REST = ((VERMILLION, "D"), (GREEN, "^"), (PURPLE, "v"), (ORANGE, "P"), (SKY, "X"))
"""Of others, in their order."""

LISTED = 20
"""Unreadable images that are listed; all are counted."""


def accuracy_section(report: Mapping[str, Any] | None, folder: str) -> Section:
    """Top-1 of every candidate with its interval, and against MACs."""
    if report is None or not report["candidates"]:
        return Section(
            "accuracy",
            TITLE,
            command=f"tome-export eval {folder} --data FOLDER",
            adds="top-1 and top-5 accuracy on your images",
        )
    data, candidates = report["data"], report["candidates"]
    level = percent(report["confidence"], 0)
    lead = (
        f"On {counted(data['images'], 'image')} of {name_of(data['source'])}. Ranges are "
        f"{level} confidence intervals of a share; they say what another sample of as many images "
        "might give, and overlap more than the difference of two models on the same images."
    )
    caption = (
        f"Top-1 accuracy of each model with its {level} confidence interval, and the same against "
        "MACs per image, with the same marks."
    )
    blocks: list[Block] = [
        Text(lead),
        Drawing(chart("accuracy", caption, lambda form: _draw(form, candidates))),
        _table(candidates),
    ]
    bad = data.get("unreadable") or []
    count = data.get("unreadable_count") or len(bad)
    if count:
        shown = bad[:LISTED]
        more = "" if len(shown) == count else f" {len(shown)} of them:"
        blocks.append(
            Text(f"Left out, as they could not be read: {counted(count, 'image')}.{more}")
        )
        rows = [(one["name"], one["reason"]) for one in shown]
        blocks.append(Table("Images that could not be read", ("image", "reason"), rows, "ll"))
    return Section("accuracy", TITLE, tuple(blocks))


def name_of(source: str) -> str:
    """The last part of a path: the rest is about somebody's machine."""
    return source.rstrip("/").rpartition("/")[2] or source


def candidate(report: Mapping[str, Any] | None, name: str) -> Mapping[str, Any] | None:
    """A candidate by its name."""
    found = (c for c in (report or {}).get("candidates", ()) if c["name"] == name)
    return next(found, None)


def _table(candidates: Sequence[Mapping[str, Any]]) -> Table:
    plain = next((c for c in candidates if c["name"] == "unmerged"), None)
    rows = []
    for one in candidates:
        top1, top5, agreement = (
            one["top1"],
            one.get("top5"),
            one.get("agreement_with_unmerged"),
        )
        change = points(top1["share"] - plain["top1"]["share"]) if plain else NONE
        rows.append(
            (
                one["name"],
                one["backend"],
                macs(one["macs"]),
                percent(top1["share"], 2),
                span(f"{100 * top1['low']:.2f}", percent(top1["high"], 2)),
                "" if one is plain else change,
                percent(top5["share"], 2) if top5 else NONE,
                percent(agreement["share"], 2) if agreement else NONE,
            )
        )
    headers = (
        "model",
        "backend",
        "MACs",
        "top-1",
        "interval",
        "change, points",
        "top-5",
        "as unmerged",
    )
    return Table("Accuracy of every model", headers, rows, "llrrrrrr")


def _draw(form: Form, candidates: Sequence[Mapping[str, Any]]) -> Figure:
    height = max(2.4, 0.9 + 0.36 * len(candidates))
    figure, (by_name, by_macs) = panels(form, 2, height, narrow_height=height)
    share, low, high = (
        100 * np.array([one["top1"][key] for one in candidates]) for key in ("share", "low", "high")
    )
    spread = np.maximum([share - low, high - share], 0)
    y = np.arange(len(candidates))
    scale, unit = macs_unit(max(one["macs"] for one in candidates))
    cost = np.array([one["macs"] for one in candidates]) / scale
    rest = itertools.cycle(REST)
    for index, one in enumerate(candidates):
        colour, marker = STYLES[one["name"]] if one["name"] in STYLES else next(rest)
        bars: dict[str, Any] = {
            "fmt": marker,
            "color": colour,
            "ecolor": colour,
            "elinewidth": 1.2,
            "capsize": 3,
        }
        error = spread[:, index : index + 1]
        by_name.errorbar(share[index], y[index], xerr=error, **bars)
        by_macs.errorbar(cost[index], share[index], yerr=error, **bars)
    by_name.set_yticks(y, [f"{one['name']}, {one['backend']}" for one in candidates])
    by_name.set_ylim(len(candidates) - 0.5, -0.5)
    by_name.tick_params(axis="y", length=0)
    by_name.grid(visible=True, axis="x")
    by_name.grid(visible=False, axis="y")
    by_name.locator_params(axis="x", nbins=5)
    by_name.set_xlabel("top-1 accuracy (%)")
    by_macs.set_xlabel(f"{unit} per image")
    by_macs.set_ylabel("top-1 accuracy (%)")
    by_macs.set_xlim(0, float(cost.max()) * 1.12)
    return figure
