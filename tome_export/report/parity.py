"""The section on parity: every decision that differs, and what it hangs on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from tome_export.report.numbers import NONE, counted, fixed, percent, small
from tome_export.report.parts import Block, Drawing, Section, Table, Text
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
"""Kinds of disagreement, as ``parity.decisions`` has them, in words."""


def parity_section(report: Mapping[str, Any] | None, folder: str) -> Section:
    """Decisions, margins, errors and every listed disagreement of each check."""
    if report is None:
        return Section(
            "parity",
            TITLE,
            command=f"tome-export check {folder}",
            adds="the comparison with PyTorch, decision by decision",
        )
    blocks: list[Block] = []
    for index, check in enumerate(report["checks"]):
        blocks += _check(check, index)
    return Section("parity", TITLE, tuple(blocks))


def _check(check: Mapping[str, Any], index: int) -> Iterator[Block]:
    verdict = "passes" if check["passed"] else "FAILS"
    explained = check["disagreements"] - sum(layer["defects"] for layer in check["layers"])
    images = counted(check["images"], _subject(check))
    yield Text(
        f"On {images} {check['candidate']}, {check['precision']}, "
        f"{verdict} against PyTorch in fp32: of {counted(check['decisions'], 'decision')} "
        f"{check['disagreements']:,} differ{_explained(check['disagreements'], explained)}, "
        f"{counted(check['defects'], 'defect')}.",
        "" if check["passed"] else "bad",
    )
    for failure in check["failures"]:
        yield Text(_capital(failure), "bad")
    layers = check["layers"]
    if not layers:
        yield Text("No layer merges, so there are no decisions to compare.")
    else:
        yield Drawing(chart(f"parity{index}", _caption(check), lambda form: _draw(form, layers)))
        yield _layer_table(check)
        yield from _disagreements(check)
    yield _error_table(check)


def _subject(check: Mapping[str, Any]) -> str:
    return str(check.get("subject", "image"))  # reports of before do not say


def _explained(disagreements: int, explained: int) -> str:
    if not disagreements:
        return ""
    return f" ({explained:,} explained by rounding)"


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _caption(check: Mapping[str, Any]) -> str:
    drawn = sum(layer["disagreements"] > 0 for layer in check["layers"])
    dots = (
        "the largest margin among the decisions that differ"
        if drawn
        else "no decision differs, so there is no margin to show"
    )
    return (
        f"Left, or above: what rounding can overturn in each layer, and {dots}. Right, or below: "
        f"the largest error of a cosine score, and {check['k']:g} times that of PyTorch in "
        f"{check['precision']}, which is allowed. Logarithmic; zeros are not drawn."
    )


def _draw(form: Form, layers: list[dict[str, Any]]) -> Figure:
    figure, (margin, error) = panels(form, 2, 2.9, narrow_height=2.35)
    _series(margin, layers, "margin_bound", GREY, "bound, or allowed", line=True)
    _series(margin, layers, "largest_margin", VERMILLION, "largest margin that differs")
    _series(error, layers, "score_error_allowed", GREY, "", line=True)
    _series(error, layers, "score_error", BLUE, "score error")
    margin.set_ylabel("score margin (cosine)")
    error.set_ylabel("score error (cosine)")
    for axes in (margin, error):
        whole_numbers(axes, form, max(layer["layer"] for layer in layers) + 1)
        power_ticks(axes)
    handles = [handle for axes in (margin, error) for handle in axes.get_legend_handles_labels()[0]]
    legend(figure, margin, form, handles=handles)
    return figure


def _series(
    axes: Axes,
    layers: list[dict[str, Any]],
    key: str,
    colour: str,
    label: str,
    *,
    line: bool = False,
) -> None:
    found = [(layer["layer"], layer[key]) for layer in layers if layer[key]]
    if found:
        x, y = zip(*found, strict=True)
        style = "_" if line else "o"
        axes.plot(
            x,
            y,
            color=colour,
            marker=style,
            markersize=11 if line else 5.5,
            markeredgewidth=2 if line else 0,
            linestyle=(0, (1, 2)) if line else "none",
            linewidth=1,
            label=label or "_",
        )


def _layer_table(check: Mapping[str, Any]) -> Table:
    rows = [
        (
            layer["layer"],
            f"{layer['decisions']:,}",
            layer["disagreements"],
            layer["defects"] + layer["op_defects"],
            small(layer["largest_margin"]) if layer["disagreements"] else NONE,
            small(layer["margin_bound"]),
            small(layer["score_error"]),
            small(layer["score_error_allowed"]),
            layer["images_diverged"],
        )
        for layer in check["layers"]
    ]
    headers = (
        "layer",
        "decisions",
        "differ",
        "defects",
        "margin",
        "bound",
        "score error",
        "allowed",
        f"{_subject(check)}s diverging",
    )
    marked = frozenset(index for index, row in enumerate(rows) if row[3])
    return Table("Decisions and scores of every merging layer", headers, rows, marked=marked)


def _disagreements(check: Mapping[str, Any]) -> Iterator[Block]:
    rows: list[tuple[object, ...]] = []
    marked: set[int] = set()
    for layer in check["layers"]:
        bound = layer["margin_bound"]
        for one in layer["examples"]:
            within = one["margin"] is not None and bound is not None and one["margin"] <= bound
            if not within:
                marked.add(len(rows))
            rows.append(
                (
                    layer["layer"],
                    one["image"],
                    one["token"],
                    KINDS.get(one["kind"], one["kind"]),
                    small(one["margin"]),
                    small(bound),
                    "rounding can overturn it" if within else "DEFECT: rounding cannot",
                )
            )
    if not check["disagreements"]:
        return
    total = check["disagreements"]
    listed = (
        f"All {total:,} are listed."
        if len(rows) >= total
        else f"{len(rows):,} of {total:,} are listed, in each layer those with the largest margin."
    )
    yield Text(
        "Each decision that differs hangs on two cosine scores. If the reference has them closer "
        f"than rounding can move them, the difference is explained. {listed}"
    )
    headers = ("layer", _subject(check), "token", "decision", "margin", "bound", "explained")
    yield Table("Every listed disagreement", headers, rows, "rrrlrrl", frozenset(marked))


def _error_table(check: Mapping[str, Any]) -> Table:
    led, output = check["led_output"], check["output"]
    rows = [
        ("on the reference's plans", led["max_abs"], check["led_allowed"], led),
        ("as shipped, deciding by itself", output["max_abs"], None, output),
        ("shipped graph against its twin", check["twin_difference"], check["twin_allowed"], None),
    ]
    return Table(
        "Output error against what is allowed",
        ("output", "largest error", "allowed", "share of allowed", "cosine", "top-1 agreement"),
        [
            (
                name,
                small(error),
                small(allowed),
                percent(error / allowed) if error is not None and allowed else NONE,
                fixed(values["cosine"], 7) if values else NONE,
                percent(values["top1_agreement"]) if values else NONE,
            )
            for name, error, allowed, values in rows
        ],
    )
