"""The section on accuracy: top-1 of labelled images, else how near merging stays to the model."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from tome_export.artifact.evaluation import (
    CandidateResult,
    Cosines,
    Deviations,
    Difference,
    Evaluation,
    EvaluationData,
    Share,
)
from tome_export.artifact.files import utf8
from tome_export.display import NONE, counted, fixed, macs, macs_unit, percent, points, span
from tome_export.report.parts import Block, Section, Table, Text
from tome_export.report.plot import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PURPLE,
    SKY,
    VERMILLION,
    Form,
    bars,
    chart,
    named_rows,
    panels,
    reach,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TITLE = "Accuracy"

LISTED = 20
"""Unreadable images that are listed; all are counted."""

STYLES = {"merged": (BLUE, "o"), "unmerged": (GREY, "s")}
"""Colour and marker of the two models that every evaluation has."""

REST = ((VERMILLION, "D"), (GREEN, "^"), (PURPLE, "v"), (ORANGE, "P"), (SKY, "X"))
"""Of others, in their order."""


@dataclass(frozen=True)
class Measure:
    """What is shown of each candidate: a share with an interval, or a mean with the smallest.

    Attributes:
        key: Its entry in the evaluation.
        title: As captions call it.
        axis: The same in few words.
        explained: What to know of it; ``{}`` is the level of confidence.
    """

    key: Literal["top1", "agreement_with_unmerged", "cosine_to_unmerged", "deviation_from_unmerged"]
    title: str
    axis: str
    explained: str

    def of(self, candidate: CandidateResult) -> Share | Cosines | Deviations | None:
        """What was found of a candidate."""
        found: Share | Cosines | Deviations | None = getattr(candidate, self.key)
        return found

    def values(self, candidate: CandidateResult) -> tuple[float, float, float]:
        """Value, lower and upper end of its range, as the axis has them."""
        found = self.of(candidate)
        if isinstance(found, Share):
            return 100 * found.share, 100 * found.low, 100 * found.high
        if found is None:
            raise ValueError(f"{candidate.name} has no {self.key}")
        if isinstance(found, Deviations):
            return found.mean, found.mean, found.max
        return found.mean, found.min, found.mean

    @property
    def label(self) -> str:
        """Of an axis."""
        return self.axis if self in (COSINE, DEVIATION) else f"{self.axis} (%)"

    @property
    def ranges(self) -> str:
        """What is drawn beside a value; ``{}`` is the level of confidence."""
        ends = {"cosine_to_unmerged": "smallest", "deviation_from_unmerged": "largest"}
        end = ends.get(self.key)
        return f"mean, with a line to the {end}" if end else "with its {} confidence interval"


TOP1 = Measure(
    "top1",
    "top-1 accuracy",
    "top-1 accuracy",
    "Ranges are {} confidence intervals. That of a change is for the same images under both "
    "models; those of the shares say what another sample of as many images might give, and "
    "overlap more.",
)
AGREEMENT = Measure(
    "agreement_with_unmerged",
    "agreement with the unmerged model",
    "agreement",
    "They have no labels: what can be told is on how many of them a model's answer is that of the "
    "unmerged model. Ranges are {} confidence intervals.",
)
COSINE = Measure(
    "cosine_to_unmerged",
    "cosine to the unmerged model",
    "cosine",
    "The model has no classes: what can be told is the cosine of an image's features to those of "
    "the unmerged model, 1 where they are the same.",
)
DEVIATION = Measure(
    "deviation_from_unmerged",
    "deviation from the unmerged model",
    "deviation",
    "The model gives numbers (a regression): what can be told is how far they are from those of "
    "the unmerged model.",
)
NO_MEASURE = (
    "They have no labels, and no other model was run to compare with: all there is to tell is what "
    "was run."
)


def accuracy_section(evaluation: Evaluation | None, folder: str) -> Section:
    """What was evaluated of every candidate with its interval, and against MACs."""
    if evaluation is None or not evaluation.candidates:
        return Section(
            "accuracy",
            TITLE,
            command=f"tome-export eval {folder} --data FOLDER",
            adds="top-1 and top-5 accuracy on your images",
        )
    data, candidates = evaluation.data, evaluation.candidates
    level, measure = percent(evaluation.confidence, 0), measure_of(evaluation)
    # The last part of a path: the rest is about somebody's machine.
    name = utf8(data.source.rstrip("/").rpartition("/")[2] or data.source).decode()
    explained = measure.explained.format(level) if measure else NO_MEASURE
    blocks: list[Block] = [Text(f"On {counted(data.images, 'image')} of {name}. {explained}")]
    blocks += [
        Text(
            f"{one.name} on {one.backend} gave no finite numbers for "
            f"{counted(one.not_finite, 'image')}.",
            "bad",
        )
        for one in candidates
        if one.not_finite
    ]
    if measure is not None:
        shown = [one for one in candidates if measure.of(one)]
        ranges = measure.ranges.format(level)
        caption = (
            f"{measure.title} of each candidate, {ranges}, and the same against MACs per image."
        )
        caption = caption[:1].upper() + caption[1:]
        blocks.append(chart("accuracy", caption, lambda form: _draw(form, shown, measure)))
    return Section("accuracy", TITLE, (*blocks, _table(candidates), *_unreadable(data)))


def measure_of(evaluation: Evaluation) -> Measure | None:
    """What there is to show of an evaluation: labels come before all else."""
    measures = (TOP1, AGREEMENT, COSINE, DEVIATION)
    return next((m for m in measures if any(map(m.of, evaluation.candidates))), None)


def candidate(evaluation: Evaluation, name: str) -> CandidateResult | None:
    """A candidate by its name."""
    return next((one for one in evaluation.candidates if one.name == name), None)


def _draw(form: Form, candidates: Sequence[CandidateResult], measure: Measure) -> Figure:
    height = max(2.4, 0.9 + 0.36 * len(candidates))
    figure, (by_name, by_macs) = panels(form, 2, height, narrow_height=height)
    scale, unit = macs_unit(max(one.macs for one in candidates))
    rest = itertools.cycle(REST)
    for y, one in enumerate(candidates):
        look = bars(*(STYLES[one.name] if one.name in STYLES else next(rest)))
        value, low, high = measure.values(one)
        error = reach([value], [low], [high])
        by_name.errorbar([value], [y], xerr=error, **look)
        by_macs.errorbar([one.macs / scale], [value], yerr=error, **look)
    names = [f"{one.name}, {one.backend}" for one in candidates]
    by_name.set_yticks(range(len(candidates)), names)
    by_name.set_ylim(len(candidates) - 0.5, -0.5)
    named_rows(by_name)
    by_name.locator_params(axis="x", nbins=5)
    by_name.set_xlabel(measure.label)
    by_macs.set_xlabel(f"{unit} per image")
    by_macs.set_ylabel(measure.label)
    by_macs.set_xlim(0, max(one.macs for one in candidates) / scale * 1.12)
    return figure


def _share(found: Share | None) -> str:
    return percent(found.share, 2) if found else NONE


def _interval(found: Share | None) -> str:
    return span(f"{100 * found.low:.2f}", percent(found.high, 2)) if found else NONE


def _change(found: Difference | None) -> str:
    if found is None:
        return NONE
    return f"{points(found.share)} ({points(found.low)} to {points(found.high)})"


def _table(candidates: Sequence[CandidateResult]) -> Table:
    """A row per candidate; columns without a single figure are left out."""
    labelled = any(one.top1 for one in candidates)
    columns: dict[str, list[str]] = {
        "top-1": [_share(one.top1) for one in candidates],
        "interval": [_interval(one.top1) for one in candidates],
        "change, points": [_change(one.difference_to_unmerged) for one in candidates],
        "top-5": [_share(one.top5) for one in candidates],
        "as unmerged": [_share(one.agreement_with_unmerged) for one in candidates],
        "interval of it": [
            NONE if labelled else _interval(one.agreement_with_unmerged) for one in candidates
        ],
    }
    cosines = [one.cosine_to_unmerged for one in candidates]
    columns["cosine, mean"] = [fixed(one.mean, 6) if one else NONE for one in cosines]
    columns["smallest"] = [fixed(one.min, 6) if one else NONE for one in cosines]
    apart = [one.deviation_from_unmerged for one in candidates]
    columns["deviation, mean"] = [f"{one.mean:.4g}" if one else NONE for one in apart]
    columns["largest"] = [f"{one.max:.4g}" if one else NONE for one in apart]
    columns["spread of unmerged"] = [f"{one.spread:.4g}" if one else NONE for one in apart]
    if any(one.not_finite for one in candidates):
        columns["not finite"] = [str(one.not_finite) for one in candidates]
    shown = {header: cells for header, cells in columns.items() if set(cells) != {NONE}}
    rows = [
        (one.name, one.backend, macs(one.macs), *(cells[index] for cells in shown.values()))
        for index, one in enumerate(candidates)
    ]
    headers = ("model", "backend", "MACs", *shown)
    return Table("Accuracy of every model", headers, rows, "ll" + "r" * (len(headers) - 2))


def _unreadable(data: EvaluationData) -> list[Block]:
    count, shown = data.unreadable_count, data.unreadable[:LISTED]
    if not count:
        return []
    more = "" if len(shown) == count else f" {len(shown)} of them:"
    rows = [(one.name, one.reason) for one in shown]
    return [
        Text(f"Left out, as they could not be read: {counted(count, 'image')}.{more}"),
        Table("Images that could not be read", ("image", "reason"), rows, "ll"),
    ]
