"""The page of a cascade: accuracy against mean MACs, its members as the baseline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

import tome_export
from tome_export.report.numbers import counted, macs, macs_unit, percent, points, span
from tome_export.report.page import environment, template_file
from tome_export.report.parts import Drawing, Section, Table, Text
from tome_export.report.plot import BLUE, VERMILLION, Form, chart, legend, panels, ring

if TYPE_CHECKING:
    from matplotlib.figure import Figure

METRICS = {"top1": "top-1 accuracy", "agreement": "agreement with the highest artifact"}

POLICIES = {
    "complexity": "The artifact is chosen by the complexity of the image, the mean absolute "
    "difference of neighbouring pixels.",
    "confidence": "Every image begins at the lowest artifact and goes on to the next while the "
    "confidence is under a threshold; it costs the sum of all that it was given to.",
    "learned": "The artifact is chosen by a linear head on the pooled patch embedding.",
}


def render_cascade(values: Mapping[str, Any]) -> str:
    """The page as text, from the content of ``cascade.json``; the same gives the same."""
    return (
        environment()
        .get_template("cascade.html.j2")
        .render(
            model=values["model"],
            random=values["random_weights"],
            section=cascade_section(values),
            style=template_file("report.css"),
            version=tome_export.__version__,
        )
    )


def cascade_section(values: Mapping[str, Any]) -> Section:
    """Text, chart and tables."""
    data, chosen, metric = values["data"], values["chosen"]["test"], METRICS[values["metric"]]
    level = percent(values["confidence"], 0)
    fitted = f", trained on {counted(data['fitted'], 'image')}" if data["fitted"] else ""
    change = chosen["difference_to_highest"]
    lead = (
        f"{POLICIES[values['policy']]} Target: {values['target']['text']}. Calibrated on "
        f"{counted(data['calibration'], 'image')}{fitted}; all that is shown was measured on "
        f"{counted(data['test'], 'other image')}."
    )
    result = (
        f"The chosen setting takes {macs(chosen['macs'])} per image on average at "
        f"{percent(chosen['share'], 2)} {metric} ({level} interval "
        f"{span(percent(chosen['low'], 2), percent(chosen['high'], 2))}), "
        f"{points(change['share'])} points against the highest artifact. {_single(values)}"
    )
    missed = () if chosen["met"] else (Text("The target is missed on these images.", "bad"),)
    caption = (
        f"{metric[:1].upper()}{metric[1:]} against mean MACs per image on the test images: the "
        "line joins the settings that no other beats on the calibration images, a ring marks the "
        f"chosen one, circles are the artifacts alone with intervals of {level}."
    )
    drawing = Drawing(chart("cascade", caption, lambda form: draw_cascade(form, values, metric)))
    return Section(
        "cascade",
        "Budgets per image",
        (Text(lead), Text(result), *missed, drawing, _members(values, metric), _sweep(values)),
    )


def draw_cascade(form: Form, values: Mapping[str, Any], metric: str) -> Figure:
    """Members with their intervals, the sweep as a line, the chosen setting ringed."""
    figure, (axes,) = panels(form, 1, 3.6, narrow_height=3.1)
    sweep: Sequence[Mapping[str, Any]] = values["sweep"]
    members = [(one["macs"], one["test"]) for one in values["members"]]
    scale, unit = macs_unit(max(count for count, _ in members))
    line = np.array(sorted((p["test"]["macs"] / scale, p["test"]["share"]) for p in sweep))
    axes.plot(line[:, 0], 100 * line[:, 1], "-D", color=VERMILLION, ms=3.5, label=values["policy"])
    share = np.array([[one[key] for key in ("share", "low", "high")] for _, one in members])
    axes.errorbar(
        [count / scale for count, _ in members],
        100 * share[:, 0],
        yerr=np.maximum(100 * np.stack([share[:, 0] - share[:, 1], share[:, 2] - share[:, 0]]), 0),
        fmt="o",
        color=BLUE,
        elinewidth=1.2,
        capsize=3,
        label="one artifact for all",
    )
    chosen = values["chosen"]["test"]
    ring(axes, [chosen["macs"] / scale], [100 * chosen["share"]])
    axes.set_xlabel(f"mean {unit} per image")
    axes.set_ylabel(f"{metric} (%)" if form.wide else "accuracy (%)")
    legend(figure, axes, form)
    return figure


def _single(values: Mapping[str, Any]) -> str:
    single = values["single"]
    if single is None:
        return "No artifact alone is as accurate on these images."
    word = "fewer" if single["saved"] >= 0 else "more"
    return (
        f"The cheapest artifact alone that is as accurate takes {macs(single['macs'])}: "
        f"{percent(abs(single['saved']))} {word} MACs."
    )


def _members(values: Mapping[str, Any], metric: str) -> Table:
    """The artifacts, and how many of the images end at each."""
    budgets, images = values["chosen"]["test"]["budgets"], values["data"]["test"]
    rows = [
        (
            str(index),
            one["schedule"],
            macs(one["macs"]),
            percent(one["test"]["share"], 2),
            span(percent(one["test"]["low"], 2), percent(one["test"]["high"], 2)),
            percent(count / images),
        )
        for index, (one, count) in enumerate(zip(values["members"], budgets, strict=True))
    ]
    headers = ("budget", "schedule", "MACs", metric, "interval", "images that end here")
    return Table("The artifacts", headers, rows, "llrrrr")


def _sweep(values: Mapping[str, Any]) -> Table:
    rows = [
        (
            macs(one["calibration"]["macs"]),
            percent(one["calibration"]["share"], 2),
            macs(one["test"]["macs"]),
            percent(one["test"]["share"], 2),
            "chosen" if one["chosen"] else "",
        )
        for one in values["sweep"]
    ]
    headers = ("calibration MACs", "accuracy", "test MACs", "accuracy", "")
    marked = frozenset(index for index, one in enumerate(values["sweep"]) if one["chosen"])
    return Table("The sweep of thresholds", headers, rows, "rrrrl", marked)
