"""Charts as inline SVG: one for wide screens and paper, one for phones, in the page's colours."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable, Sequence
from importlib import resources
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, MUTED, RULE = "#1b1b1d", "#5c5c61", "#d3d3d7"
"""Text, lesser text and grid lines; the page has its own colours for each, light and dark."""

BLUE, ORANGE, GREEN, VERMILLION = "#0072b2", "#e69f00", "#009e73", "#d55e00"
PURPLE, SKY, YELLOW, GREY = "#cc79a7", "#56b4e9", "#f0e442", "#8d8d93"
"""Okabe and Ito's colours (Color Universal Design, 2008), and a grey."""

VARIABLES = {
    INK: "--ink",
    MUTED: "--muted",
    RULE: "--rule",
    BLUE: "--blue",
    ORANGE: "--orange",
    GREEN: "--green",
    VERMILLION: "--vermillion",
    PURPLE: "--purple",
    SKY: "--sky",
    YELLOW: "--yellow",
    GREY: "--grey",
}
"""Colour in a drawing -> the page's variable for it."""

Form = Literal["wide", "narrow"]
"""The size in which a chart is drawn; panels of a wide one stand side by side."""

INCHES: dict[Form, float] = {"wide": 9.2, "narrow": 3.7}

Draw = Callable[..., "Figure"]

_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def chart_svgs(name: str, caption: str, draw: Draw, *found: Any) -> list[str]:
    """Draw a chart in both sizes, each by ``draw(form, *found)``; its ids begin with the name."""
    return [_svg(f"{name}-{form}", caption, form, draw, *found) for form in INCHES]


def panels(
    form: Form, count: int, height: float, *, narrow_height: float | None = None
) -> tuple[Figure, list[Axes]]:
    """A figure with panels side by side, or one above the other where it is narrow.

    Heights are in inches: of the wide figure, and of one panel of the narrow one.
    """
    from matplotlib.figure import Figure

    rows, cols = (1, count) if form == "wide" else (count, 1)
    if form == "narrow":
        height = (narrow_height or height) * count
    figure = Figure(figsize=(INCHES[form], height), layout="constrained")
    grid: Any = figure.subplots(rows, cols, squeeze=False)
    axes = list(grid.ravel())
    for one in axes:
        one.spines[["top", "right"]].set_visible(False)
        one.set_axisbelow(True)
    return figure, axes


def legend(figure: Figure, axes: Axes, form: Form, handles: Sequence[Any] | None = None) -> None:
    """The series of one panel, or those given, above all panels."""
    if handles is None:
        handles = axes.get_legend_handles_labels()[0]
    if handles:
        columns = 6 if form == "wide" else 2 if len(handles) > 1 else 1
        figure.legend(handles=list(handles), loc="outside upper left", ncols=columns)


def ring(axes: Axes, x: Sequence[float], y: Sequence[float]) -> None:
    """A ring around the chosen points."""
    style: Any = {"facecolors": "none", "edgecolors": INK, "linewidths": 1.4, "zorder": 4}
    axes.scatter(x, y, 130, label="chosen", **style)


def reach(value: Any, low: Any, high: Any) -> Any:
    """How far ranges reach below and above values ``[B]``: ``[2, B]``, for error bars."""
    return np.maximum(np.stack([np.subtract(value, low), np.subtract(high, value)]), 0)


def bars(colour: str, marker: str = "o") -> dict[str, Any]:
    """The look of a point with its error bar."""
    look = {"color": colour, "ecolor": colour, "elinewidth": 1.2, "capsize": 3}
    return {"fmt": marker, **look}


def named_rows(axes: Axes) -> None:
    """Rows with names instead of a y axis: what counts is how far each reaches to the right."""
    axes.grid(visible=True, axis="x")
    axes.grid(visible=False, axis="y")
    axes.tick_params(axis="y", length=0)


def whole_numbers(axes: Axes, form: Form, count: int) -> None:
    """Layers 0 to ``count - 1`` along the x axis."""
    step = max(1, -(-count // (12 if form == "wide" else 8)))
    axes.set_xticks(range(0, count, step))
    axes.set_xlim(-0.7, count - 0.3)
    axes.set_xlabel("layer")


def power_ticks(axes: Axes) -> None:
    """A logarithmic y axis whose labels are plain text, such as 10⁻³."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(numticks=7))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _power(value)))
    axes.yaxis.set_minor_formatter(NullFormatter())
    low, high = axes.get_ylim()
    if high / low < 30:  # or there might be no power of ten to label
        axes.set_ylim(low / 4, high * 4)


def _power(value: float) -> str:
    exponent = f"{value:.0e}".partition("e")[2]
    return "10" + str(int(exponent)).translate(_SUPERSCRIPT)


def _svg(name: str, caption: str, form: Form, draw: Draw, *found: Any) -> str:
    import matplotlib

    stream = io.StringIO()
    style = resources.files("tome_export.report") / "templates" / "chart.mplstyle"
    with (
        resources.as_file(style) as file,
        matplotlib.rc_context({"svg.hashsalt": name}, file),
        warnings.catch_warnings(),
    ):
        # Text is measured in DejaVu, yet shown in the reader's fonts, which may have the glyph.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        nothing = {"Date": None, "Creator": None, "Format": None, "Type": None}
        draw(form, *found).savefig(stream, format="svg", metadata=nothing)
    return _inline(stream.getvalue(), name, caption, form)


def _inline(text: str, name: str, caption: str, form: Form) -> str:
    """An SVG document as part of a page: own ids, the page's font and colours, a description."""
    from markupsafe import escape

    text = text[text.index("<svg") :]
    text = re.sub(r"<!--.*?-->\s*", "", text, flags=re.DOTALL)
    # A style in an inline drawing would hold for the whole page, which has its own for charts.
    text = re.sub(r"<(metadata|style)\b.*?</\1>\s*", "", text, flags=re.DOTALL)
    text = re.sub(r' transform="rotate\(-0 [^)]*\)"', "", text)
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = re.sub(r'((?:xlink:)?href=")#', rf"\1#{name}-", text).replace("xlink:href", "href")
    text = text.replace("url(#", f"url(#{name}-")
    text = re.sub(r"(font:[^;\"]*?)'DejaVu Sans'[^;\"]*", r"\1var(--font)", text)
    text = re.sub(r"font-family: *'DejaVu Sans'[^;\"]*", "font-family: var(--font)", text)
    for colour, variable in VARIABLES.items():
        text = re.sub(colour, f"var({variable})", text, flags=re.IGNORECASE)
    view = re.search(r'viewBox="([^"]*)"', text)
    assert view is not None  # noqa: S101 (matplotlib always writes one)
    body = text[text.index(">") + 1 :]
    return (
        f'<svg class="chart {form}" role="img" viewBox="{view[1]}" '
        f'aria-label="{escape(caption)}">{body}'
    ).strip()
