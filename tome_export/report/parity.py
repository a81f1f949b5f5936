"""The section on parity: every decision that differs, and what it hangs on."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from tome_export.artifact.parity import LayerParity, ParityFile, ParityReport
from tome_export.display import NONE, counted, fixed, percent, small
from tome_export.report.parts import Block, Section, Table, Text
from tome_export.report.plot import (
    BLUE,
    GREY,
    VERMILLION,
    Form,
    chart,
    legend,
    panels,
    power_ticks,
    whole_numbers,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TITLE = "Parity with PyTorch, layer by layer"

KINDS = {
    "selection": "merged or not",
    "destination": "into which token",
    "order": "order of the tokens that stay",
    "structure": "structure of the plan",
}
"""Kinds of disagreement in words."""


def parity_section(parity: ParityFile | None, folder: str) -> Section:
    """Decisions, margins, errors and every listed disagreement of each check."""
    if parity is None:
        return Section(
            "parity",
            TITLE,
            command=f"tome-export check {folder}",
            adds="the comparison with PyTorch, decision by decision",
        )
    blocks = [block for index, one in enumerate(parity.checks) for block in _check(one, index)]
    return Section("parity", TITLE, blocks)


def _check(check: ParityReport, index: int) -> Iterator[Block]:
    layers, differ, passed = check.layers, check.disagreements, check.passed
    explained = differ - sum(layer.defects for layer in layers)
    yield Text(
        f"On {counted(check.images, check.subject)} {check.candidate}, {check.precision}, "
        f"{'passes' if passed else 'FAILS'} against PyTorch in fp32: of "
        f"{counted(check.decisions, 'decision')} {differ:,} differ"
        f"{f' ({explained:,} explained by rounding)' if differ else ''}, "
        f"{counted(check.defects, 'defect')}.",
        "" if passed else "bad",
    )
    yield from (Text(failure[:1].upper() + failure[1:], "bad") for failure in check.failures)
    if not layers:
        yield Text("No layer merges, so there are no decisions to compare.")
    else:
        yield chart(f"parity{index}", _caption(check), lambda form: _draw(form, layers))
        yield _layer_table(check)
        yield from _disagreements(check)
    yield _error_table(check)


def _caption(check: ParityReport) -> str:
    dots = (
        "the largest margin among the decisions that differ"
        if check.disagreements
        else "no decision differs, so there is no margin to show"
    )
    return (
        f"Left, or above: what rounding can overturn in each layer, and {dots}. Right, or below: "
        f"the largest error of a cosine score, and {check.k:g} times that of PyTorch in "
        f"{check.precision}, which is allowed. Logarithmic; zeros are not drawn."
    )


def _draw(form: Form, layers: Sequence[LayerParity]) -> Figure:
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


def _layer_table(check: ParityReport) -> Table:
    rows = [
        (
            layer.layer,
            f"{layer.decisions:,}",
            layer.disagreements,
            layer.defects + layer.op_defects,
            small(layer.largest_margin) if layer.disagreements else NONE,
            small(layer.margin_bound),
            small(layer.score_error),
            small(layer.score_error_allowed),
            layer.images_diverged,
        )
        for layer in check.layers
    ]
    headers = ["layer", "decisions", "differ", "defects", "margin", "bound", "score error"]
    headers += ["allowed", f"{check.subject}s diverging"]
    marked = frozenset(index for index, row in enumerate(rows) if row[3])
    return Table("Decisions and scores of every merging layer", headers, rows, marked=marked)


def _disagreements(check: ParityReport) -> Iterator[Block]:
    total = check.disagreements
    if not total:
        return
    listed = [(layer, example) for layer in check.layers for example in layer.examples]
    rows = [
        (
            layer.layer,
            one.image,
            one.token,
            KINDS[one.kind],
            small(one.margin),
            small(layer.margin_bound),
            "rounding can overturn it"
            if one.margin <= layer.margin_bound
            else "DEFECT: rounding cannot",
        )
        for layer, one in listed
    ]
    marked = frozenset(i for i, (at, one) in enumerate(listed) if not one.margin <= at.margin_bound)
    shown = (
        f"All {total:,} are listed."
        if len(rows) >= total
        else f"{len(rows):,} of {total:,} are listed, in each layer those with the largest margin."
    )
    yield Text(
        "Each decision that differs hangs on two cosine scores. If the reference has them closer "
        f"than rounding can move them, the difference is explained. {shown}"
    )
    headers = ("layer", check.subject, "token", "decision", "margin", "bound", "explained")
    yield Table("Every listed disagreement", headers, rows, "rrrlrrl", marked)


def _error_table(check: ParityReport) -> Table:
    rows = []
    for name, error, allowed, output in (
        ("on the reference's plans", check.led_output.max_abs, check.led_allowed, check.led_output),
        ("as shipped, deciding by itself", check.output.max_abs, None, check.output),
        ("shipped graph against its twin", check.twin_difference, check.twin_allowed, None),
    ):
        share = error / allowed if allowed and math.isfinite(allowed) else math.nan
        rows.append(
            (
                name,
                small(error),
                NONE if allowed is None else small(allowed),
                percent(share if math.isfinite(share) else None),
                fixed(output.cosine, 7) if output else NONE,
                percent(output.top1_agreement) if output else NONE,
            )
        )
    headers = ("output", "largest error", "allowed", "share of allowed", "cosine")
    return Table("Output error against what is allowed", (*headers, "top-1 agreement"), rows)
