"""Judging a reducer that decides by scores: a flip is explained by the scores that led to it.

Such a plan is made by comparing scores and nothing else, so it can be made again from the scores
that the candidate shows. If that gives the candidate's plan, and those scores are as near to the
reference's as the precision allows, then rounding explains the plan: the scores are the witness.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import numpy as np

from tome_export.artifact.parity import LISTED, Disagreement, Kind, LayerParity
from tome_export.merge.plan import step_number
from tome_export.parity.decisions import Array, Plan
from tome_export.parity.reference import LayerRecord, Pass

if TYPE_CHECKING:
    from tome_export.patch import MergedModel

GROUP, GROUPS = 64, 16
"""Scores in a group of like size, at least; and groups, at most."""

TINY = float(np.finfo(np.float32).tiny)


def judge_scores(
    model: MergedModel,
    layer: int,
    reference: Pass,
    yardstick: Pass,
    led: Pass,
    diverged: Array,
    k: float,
) -> LayerParity:
    """One layer of a ``ScoredReducer``.

    A decision is what becomes of one token: kept, folded into which, or dropped. Errors are given
    in units of the largest score of a kind, and made comparable: that of a score with a narrower
    tolerance counts for as much more. ``yardstick`` is PyTorch in the candidate's precision, led
    like the candidate by the reference; ``diverged`` ``[B]`` is the first merge whose free-running
    plan differs, or -1.
    """
    ours, theirs, measure = (p.layers[layer] for p in (reference, led, yardstick))
    tolerances = [
        _tolerance(own, score, k, _rounding(model, layer))
        for own, score in zip(measure.signals, ours.signals, strict=True)
    ]
    allowed = max(_in_units(t, s) for t, s in zip(tolerances, ours.signals, strict=True))
    errors = allowed * _excess(theirs, ours, tolerances)
    again = _plans_again(model, layer, theirs)
    found: list[Disagreement] = []
    op_defects = 0
    for image in range(len(ours.keep)):
        expected, plan = ours.plan(image), theirs.plan(image)
        op_defects += plan != again.plan(image)
        found += _differences(expected, plan, model.prefix, image, float(errors[image]))
    margins = [d.margin for d in found]
    return LayerParity(
        layer=layer,
        decisions=(model.layers[layer].tokens_in - model.prefix) * len(ours.keep),
        disagreements=len(found),
        defects=sum(not margin <= allowed for margin in margins),
        largest_margin=max(margins, default=0.0),
        margin_bound=allowed,
        score_error=float(errors.max(initial=0.0)),
        score_error_allowed=allowed,
        op_defects=op_defects,
        images_diverged=int((diverged == step_number(layer)).sum()),
        examples=tuple(sorted(found, key=lambda d: -d.margin)[:LISTED]),
    )


def _tolerance(own: Array, score: Array, k: float, rounding: float) -> Array:
    """How far each score may be off, ``[B, ...]``: k times PyTorch's own error, and fp32 rounding.

    Scores span orders of magnitude, such as those of a softmax, and the error of the largest says
    nothing of the others: a score may be off by what PyTorch's are that are no larger than it,
    within groups of like size.

    Returns:
        NaN where PyTorch's own error is as large as the largest score, which proves nothing.
    """
    size = np.abs(score.astype(np.float64)).ravel()
    error = np.abs(own.astype(np.float64).ravel() - score.ravel())
    allowed, worst = np.zeros_like(size), np.float64(0.0)
    for group in np.array_split(np.argsort(size), np.clip(size.size // GROUP, 1, GROUPS)):
        worst = np.maximum(worst, error[group].max(initial=0.0))  # keeps a NaN
        allowed[group] = k * worst + rounding * size[group].max(initial=0.0)
    if not worst < size.max(initial=0.0) + TINY:
        allowed[:] = np.nan
    tolerance: Array = np.maximum(allowed, TINY).reshape(score.shape)
    return tolerance


def _in_units(tolerance: Array, score: Array) -> float:
    """The largest tolerance in units of the largest score."""
    return float(tolerance.max()) / max(float(np.abs(score).max()), TINY)


def _excess(found: LayerRecord, expected: LayerRecord, tolerances: list[Array]) -> Array:
    """Largest difference of any score of each image, ``[B]``, in units of its tolerance."""
    worst = np.zeros(len(expected.keep))
    for a, b, tolerance in zip(found.signals, expected.signals, tolerances, strict=True):
        ratio = np.abs(a.astype(np.float64) - b.astype(np.float64)) / tolerance
        worst = np.maximum(worst, ratio.reshape(len(b), -1).max(axis=1, initial=0.0))
    return worst


def _rounding(model: MergedModel, layer: int) -> float:
    """What fp32 itself costs a score, which is a few sums over the width and over all tokens.

    The bound of a sum of n terms is about n u (Higham, Accuracy and Stability of Numerical
    Algorithms, section 3.1), u = 2^-24.
    """
    return float((model.width + model.layers[layer].tokens_in) * 2.0**-24)


def _plans_again(model: MergedModel, layer: int, record: LayerRecord) -> LayerRecord:
    """The plans that a record's own scores lead to in PyTorch."""
    import torch

    from tome_export.reducers.base import LayerSpec, ScoredReducer

    reducer = cast(ScoredReducer, model.settings.reducer)
    counts = model.layers[layer]
    place = LayerSpec(
        layer, counts.r, model.prefix, model.class_token, len(model.layers), counts.tokens_in
    )
    plan = reducer.plan(tuple(torch.from_numpy(s) for s in record.signals), place)
    return LayerRecord(record.signals, *(part.numpy() for part in plan))


def _differences(
    expected: Plan, plan: Plan, prefix: int, image: int, error: float
) -> list[Disagreement]:
    """Every token that two plans treat otherwise, or a plan that is none."""
    tokens = np.sort(np.concatenate([plan.keep, plan.src]))
    sound = np.array_equal(tokens, np.arange(len(expected.keep) + len(expected.src)))
    sound &= bool((plan.dst < len(plan.keep)).all() and (plan.dst >= -1).all())
    sound &= np.array_equal(plan.keep[:prefix], np.arange(prefix))
    found = []

    def add(token: int, kind: Kind, margin: float = error) -> None:
        found.append(Disagreement(image=image, token=token, kind=kind, margin=margin))

    if not sound:
        add(-1, "structure", np.inf)
        return found
    ours, theirs = expected.targets, plan.targets

    for token in sorted(ours.keys() | theirs.keys()):
        if (token in ours) != (token in theirs):
            add(token, "selection")
        elif ours[token] != theirs[token]:
            add(token, "destination")
    if not found and not np.array_equal(plan.keep, expected.keep):
        for moved in np.flatnonzero(plan.keep != expected.keep):
            add(int(plan.keep[moved]), "order")
    return found
