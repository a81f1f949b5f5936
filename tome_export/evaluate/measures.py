"""The content of ``eval.json``, from records and labels alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tome_export.artifact.evaluation import (
    CandidateResult,
    Evaluation,
    EvaluationData,
    Similarities,
    UnreadableImage,
)
from tome_export.data.labels import Classes
from tome_export.data.metrics import CONFIDENCE, METHODS, deviations, paired_difference, share_of
from tome_export.data.source import Labels, Source
from tome_export.evaluate.candidates import Candidate
from tome_export.evaluate.records import TOP, UNDEFINED, RecordTable
from tome_export.runtime.environment import environment
from tome_export.runtime.registry import TORCH
from tome_export.spec import Activation, OutputKind

TOP5_FROM = 10
"""Fewest classes for which top-5 is told: with fewer, guessing is right most of the time."""


@dataclass(frozen=True)
class Comparison:
    """What is compared, and how.

    Attributes:
        classes: Classes of the models; None if they give no classes.
        activation: Activation of their logits; None if they give features or maps.
        kind: What they give.
    """

    candidates: Sequence[Candidate]
    classes: Classes | None
    activation: Activation | None
    kind: OutputKind

    @property
    def plain(self) -> Candidate | None:
        """The candidate that is not merged, if there is one."""
        # By name: on the backend torch all are of PyTorch.
        return next((c for c in self.candidates if not any(c.r) and c.name != TORCH), None)


def evaluation_from_table(
    table: RecordTable, source: Source, labels: Labels | None, comparison: Comparison
) -> Evaluation:
    """The content of ``eval.json``; labels ``[B]`` are None where there are none."""
    unreadable = tuple(UnreadableImage(name=n, reason=r) for n, r in table.unreadable())
    known = None if labels is None else labels[table.readable]
    classes = comparison.classes
    return Evaluation(
        data=EvaluationData(
            source=source.text,
            kind=source.kind,
            images=int(np.count_nonzero(table.readable)),
            labelled=known is not None,
            unreadable=unreadable,
            unreadable_count=len(unreadable),
            notes=(*source.notes, *_notes(table, known, comparison)),
        ),
        classes=None if classes is None else classes.count,
        candidates=tuple(_result(one, table, known, comparison) for one in comparison.candidates),
        confidence=CONFIDENCE,
        methods=METHODS,
        batch=table.batch,
        environment=environment(),
    )


def _notes(table: RecordTable, labels: Labels | None, comparison: Comparison) -> Iterator[str]:
    classes, plain = comparison.classes, comparison.plain
    if comparison.activation == "none":
        yield (
            "the model gives numbers (a regression), not classes: labels are not used, and told is "
            "how far the numbers are from the unmerged model's"
        )
    if comparison.kind == "map" and plain is not None:
        constant = int(np.count_nonzero(table.values(plain.run) == UNDEFINED))
        if constant:
            yield (
                f"{constant} images have a constant map without merging, with which nothing "
                "correlates; they are left out of the correlations"
            )
    if classes is None:
        return
    if comparison.activation == "sigmoid" and classes.count > 2:
        same = "agreement is of all classes of an image, each of which has a yes or a no"
        top = "top-1 is of the class of the largest logit, as each image has one label"
        yield same if labels is None else f"{top}; {same}"
    found = np.empty((0, 1)) if plain is None else table.values(plain.run)
    if len(found) > 1 and (found[:, 0] == found[0, 0]).all():
        yield (
            f"the unmerged model says the same of all {len(found)} images, so agreement with it "
            "says little"
        )


def _result(
    candidate: Candidate, table: RecordTable, labels: Labels | None, comparison: Comparison
) -> CandidateResult:
    classes, plain = comparison.classes, comparison.plain
    found = table.values(candidate.run)
    finite = np.isfinite(found).all(axis=1) if classes is None else found[:, 0] >= 0
    values: dict[str, Any] = {}
    if classes is not None and labels is not None:
        best = found[:, -TOP:]
        right = best[:, 0] == labels
        values["top1"] = share_of(right)
        if classes.count >= TOP5_FROM:
            values["top5"] = share_of((best == labels[:, None]).any(axis=1))
    # A model against itself would be told as a finding, with an interval.
    if plain is not None and plain.run != candidate.run:
        base = table.values(plain.run)
        values |= _against_plain(found, base, finite, comparison)
        if "top1" in values:
            values["difference_to_unmerged"] = paired_difference(right, base[:, -TOP] == labels)
    return CandidateResult(
        name=candidate.name,
        r=candidate.r,
        backend=candidate.backend,
        macs=candidate.macs,
        not_finite=int(np.count_nonzero(~finite)),
        **values,
    )


def _against_plain(
    found: NDArray[Any],
    base: NDArray[Any],
    finite: NDArray[np.bool_],
    comparison: Comparison,
) -> dict[str, Any]:
    """How a candidate's values compare with those of the unmerged model, labels aside."""
    if comparison.activation is None:
        similar = found[finite & (found != UNDEFINED)[:, 0]]
        if not len(similar):
            return {}
        summary = Similarities(mean=float(similar.mean()), min=float(similar.min()))
        measure = "correlation" if comparison.kind == "map" else "cosine"
        return {f"{measure}_to_unmerged": summary}
    if comparison.activation == "none":
        return {"deviation_from_unmerged": deviations(found, base)}
    # An output that is not finite agrees with none, not with another such.
    values: dict[str, Any] = {
        "agreement_with_unmerged": share_of((found[:, 0] == base[:, 0]) & finite)
    }
    if found.shape[1] == 2 + TOP:
        # One logit: images may all have one answer; their probabilities tell more.
        both = finite & (base[:, 0] >= 0)
        values["deviation_from_unmerged"] = deviations(found[both, 1:2], base[both, 1:2])
    return values
