"""The numbers of an evaluation, from its records and the labels alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tome_export.evaluation.metrics import CONFIDENCE, METHODS, paired_difference, share_of
from tome_export.evaluation.records import Table
from tome_export.evaluation.source import Classes, Labels, Source
from tome_export.pipeline.eval_runs import Candidate

TOP5_FROM = 10
"""Fewest classes for which top-5 is told: with fewer, guessing is right most of the time."""


def results_of(
    table: Table,
    source: Source,
    labels: Labels | None,
    candidates: Sequence[Candidate],
    classes: Classes | None,
    plain: Candidate | None,
) -> dict[str, Any]:
    """The content of ``eval.json`` but for batch and environment.

    Args:
        table: Every record.
        source: Where the images are from.
        labels: Class of each image of the table ``[B]``; None where there are none.
        candidates: What was run.
        classes: Of the model; None if it gives features.
        plain: The candidate that is not merged, if there is one.
    """
    unreadable = table.unreadable()
    known = None if labels is None else labels[table.readable]
    return {
        "data": {
            "source": source.text,
            "kind": source.kind,
            "images": int(np.count_nonzero(table.readable)),
            "labelled": known is not None,
            "unreadable": [{"name": name, "reason": reason} for name, reason in unreadable],
            "unreadable_count": len(unreadable),
            "notes": list(source.notes),
        },
        "classes": classes.count if classes is not None else None,
        "candidates": [_candidate(c, table, known, classes, plain) for c in candidates],
        "confidence": CONFIDENCE,
        "methods": METHODS,
    }


def _candidate(
    candidate: Candidate,
    table: Table,
    labels: Labels | None,
    classes: Classes | None,
    plain: Candidate | None,
) -> dict[str, Any]:
    found = table.values(candidate.run)
    # A model against itself would be told as a finding, with an interval.
    other = plain is not None and plain.run != candidate.run
    base = table.values(plain.run) if plain is not None and other else None
    values: dict[str, Any] = {
        "name": candidate.name,
        "r": list(candidate.r),
        "backend": candidate.backend,
        "macs": candidate.macs,
        "top1": None,
        "top5": None,
        "agreement_with_unmerged": None,
        "difference_to_unmerged": None,
        "cosine_to_unmerged": None,
        "not_finite": int(np.count_nonzero(_not_finite(found, classes))),
    }
    if classes is None:
        cosines = found[np.isfinite(found)]
        if len(cosines) and other:
            summary = {"mean": float(cosines.mean()), "min": float(cosines.min())}
            values["cosine_to_unmerged"] = summary
        return values
    if labels is not None:
        right = found[:, 0] == labels
        values["top1"] = share_of(right).to_dict()
        if classes.count >= TOP5_FROM:
            values["top5"] = share_of((found == labels[:, None]).any(axis=1)).to_dict()
        if base is not None:
            difference = paired_difference(right, base[:, 0] == labels)
            values["difference_to_unmerged"] = difference.to_dict()
    if base is not None:
        # An output that is not finite agrees with none, not with another such.
        same = (found[:, 0] == base[:, 0]) & (found[:, 0] >= 0)
        values["agreement_with_unmerged"] = share_of(same).to_dict()
    return values


def _not_finite(found: NDArray[Any], classes: Classes | None) -> NDArray[np.bool_]:
    missing: NDArray[np.bool_] = (
        found[:, 0] < 0 if classes is not None else ~np.isfinite(found[:, 0])
    )
    return missing
