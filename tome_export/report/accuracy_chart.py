"""The chart of accuracy: every candidate by its name, and against MACs."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from tome_export.report.numbers import macs_unit
from tome_export.report.plot import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PURPLE,
    SKY,
    VERMILLION,
    Form,
    panels,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

STYLES = {"merged": (BLUE, "o"), "unmerged": (GREY, "s")}
"""Colour and marker of the two models that every evaluation has."""

REST = ((VERMILLION, "D"), (GREEN, "^"), (PURPLE, "v"), (ORANGE, "P"), (SKY, "X"))
"""Of others, in their order."""


@dataclass(frozen=True)
class Measure:
    """What is shown of each candidate.

    Attributes:
        key: Its entry in the report: a share with an interval, or a mean with the smallest.
        title: As captions call it.
        axis: The same in few words.
    """

    key: str
    title: str
    axis: str

    def values(
        self, candidates: Sequence[Mapping[str, Any]]
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Values ``[B]``, and how far their ranges reach below and above ``[2, B]``."""
        found = [one[self.key] for one in candidates]
        if self.is_share:
            value, low, high = (
                100 * np.array([float(one[key]) for one in found])
                for key in ("share", "low", "high")
            )
        else:
            value, low = (np.array([float(one[key]) for one in found]) for key in ("mean", "min"))
            high = value
        return value, np.maximum(np.stack([value - low, high - value]), 0)

    @property
    def is_share(self) -> bool:
        """Whether it is a share of images, shown in percent."""
        return not self.key.startswith("cosine")

    @property
    def label(self) -> str:
        """Of an axis."""
        return f"{self.axis} (%)" if self.is_share else self.axis


def draw_accuracy(form: Form, candidates: Sequence[Mapping[str, Any]], measure: Measure) -> Figure:
    """Draw the chart.

    Args:
        form: Wide or narrow.
        candidates: Those that have the measure; at least one.
        measure: What is shown.
    """
    height = max(2.4, 0.9 + 0.36 * len(candidates))
    figure, (by_name, by_macs) = panels(form, 2, height, narrow_height=height)
    value, spread = measure.values(candidates)
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
        by_name.errorbar(value[index], y[index], xerr=error, **bars)
        by_macs.errorbar(cost[index], value[index], yerr=error, **bars)
    by_name.set_yticks(y, [f"{one['name']}, {one['backend']}" for one in candidates])
    by_name.set_ylim(len(candidates) - 0.5, -0.5)
    by_name.tick_params(axis="y", length=0)
    by_name.grid(visible=True, axis="x")
    by_name.grid(visible=False, axis="y")
    by_name.locator_params(axis="x", nbins=5)
    by_name.set_xlabel(measure.label)
    by_macs.set_xlabel(f"{unit} per image")
    by_macs.set_ylabel(measure.label)
    by_macs.set_xlim(0, float(cost.max()) * 1.12)
    return figure
