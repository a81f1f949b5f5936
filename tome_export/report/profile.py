"""Where the time goes: the parts of a model by the runtime's own profiler."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tome_export.report.numbers import counted, milliseconds, percent
from tome_export.report.parts import Block, Drawing, Table, Text
from tome_export.report.plot import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PURPLE,
    RULE,
    SKY,
    VERMILLION,
    YELLOW,
    Form,
    chart,
    legend,
    panels,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

OTHER = "other"
"""What belongs to no group; plain grey, and last."""

COLOURS = {
    "attention": (BLUE, ""),
    "mlp": (SKY, ""),
    "match": (VERMILLION, ""),
    "merge": (ORANGE, ""),
    "norm": (GREEN, ""),
    "embedding": (PURPLE, ""),
    "head": (YELLOW, ""),
    OTHER: (GREY, ""),
}
"""Colour and hatch of the groups that every profile has."""

REST = ((GREY, "////"), (GREY, "...."), (GREY, "xxxx"), (GREY, "----"))
"""Of further groups, in their order."""


def profile_blocks(profiles: Sequence[Mapping[str, Any]], other: str) -> Iterator[Block]:
    """A stacked bar per model for every profile, and the same as a table."""
    for index, profile in enumerate(profiles):
        models = {"merged": profile["merged"]["groups_ms"]}
        if profile.get("against"):
            models = {other: profile["against"]["groups_ms"], **models}
        groups = _groups(models.values())
        yield Text(
            f"Where the time goes on {profile['backend']}, batch {profile['batch']}, by the "
            f"runtime's own profiler: {percent(profile['attributed_share'])} of "
            f"{milliseconds(profile['total_ms'])} ms is attributed to "
            f"{counted(len(groups), 'named group')}.{_merging(models['merged'])}"
        )
        caption = (
            f"Time per run in each part of the model, stacked: {', '.join(models)}, on "
            f"{profile['backend']} with batch {profile['batch']}."
        )

        def draw(form: Form, models: Any = models, groups: Any = groups) -> Figure:
            return _draw(form, models, groups)

        yield Drawing(chart(f"profile{index}", caption, draw))
        yield _table(models, groups)


def _groups(models: Any) -> list[str]:
    found = {group: None for groups in models for group in groups}
    known = [group for group in COLOURS if group in found and group != OTHER]
    rest = [group for group in found if group not in COLOURS]
    return [*known, *rest, *([OTHER] if OTHER in found else [])]


def _merging(groups: Mapping[str, float]) -> str:
    total = sum(groups.values())
    share = sum(groups.get(name, 0.0) for name in ("match", "merge"))
    return f" Matching and merging take {percent(share / total)} of it." if total else ""


def _table(models: Mapping[str, Mapping[str, float]], groups: Sequence[str]) -> Table:
    totals = {name: sum(times.values()) for name, times in models.items()}
    headers = ["part"]
    for name in models:
        headers += [f"{name} ms", "share"]
    rows = []
    for group in groups:
        row = [group]
        for name, times in models.items():
            value = times.get(group)
            share = value / totals[name] if value is not None and totals[name] else None
            row += [milliseconds(value), percent(share)]
        rows.append(row)
    return Table("Time in each part of the model", headers, rows)


def _draw(form: Form, models: Mapping[str, Mapping[str, float]], groups: Sequence[str]) -> Figure:
    figure, (axes,) = panels(form, 1, 1.25 + 0.42 * len(models), narrow_height=2.5)
    rest = iter(REST * (1 + len(groups) // len(REST)))
    left = dict.fromkeys(models, 0.0)
    for group in groups:
        colour, hatch = COLOURS.get(group) or next(rest)
        widths = [times.get(group, 0.0) for times in models.values()]
        axes.barh(
            list(models),
            widths,
            0.62,
            left=list(left.values()),
            color=colour,
            hatch=hatch,
            edgecolor=RULE if hatch else "none",
            label=group,
        )
        left = {name: left[name] + width for name, width in zip(models, widths, strict=True)}
    axes.grid(visible=True, axis="x")
    axes.grid(visible=False, axis="y")
    axes.invert_yaxis()
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel("time per run (ms)")
    legend(figure, axes, form)
    return figure
