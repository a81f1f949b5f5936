"""Judging a reducer that decides by scores: a flip is explained by the scores that led to it.

Such a plan is made by comparing scores and nothing else, so it can be made again from the scores
that the candidate shows. If that gives the candidate's plan, and those scores are as near to the
reference's as the precision allows, then rounding explains the plan: the scores are the witness.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import numpy as np

from tome_export.parity.decisions import Array, Disagreement, Kind, Plan
from tome_export.parity.reference import LayerRecord, Pass
from tome_export.parity.report import LISTED, LayerParity

if TYPE_CHECKING:
    from tome_export.patch import MergedModel


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

    A decision is what becomes of one token: kept, folded into which, or dropped. Scores are
    compared in units of the largest of their kind in the reference.

    Args:
        model: The reference's model.
        layer: Index of the block.
        reference: PyTorch in fp32.
        yardstick: PyTorch in the candidate's precision, led by the reference.
        led: The candidate, led by the reference.
        diverged: ``[B]``, the first layer whose free-running plan differs, or -1.
        k: Error allowed as a multiple of PyTorch's own.
    """
    ours, theirs, measure = (p.layers[layer] for p in (reference, led, yardstick))
    errors, own = _errors(theirs, ours), _errors(measure, ours)
    allowed = k * float(own.max(initial=0.0)) + _rounding(model, layer)
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
        defects=sum(margin > allowed for margin in margins),
        largest_margin=max(margins, default=0.0),
        margin_bound=allowed,
        score_error=float(errors.max(initial=0.0)),
        score_error_allowed=allowed,
        op_defects=op_defects,
        images_diverged=int((diverged == layer).sum()),
        examples=tuple(sorted(found, key=lambda d: -d.margin)[:LISTED]),
    )


def _errors(found: LayerRecord, expected: LayerRecord) -> Array:
    """Largest difference of any score of each image, ``[B]``, in units of that kind's largest."""
    worst = np.zeros(len(expected.keep))
    for a, b in zip(found.signals, expected.signals, strict=True):
        difference = np.abs(a.astype(np.float64) - b.astype(np.float64)).reshape(len(b), -1)
        scale = max(float(np.abs(b).max(initial=0.0)), float(np.finfo(np.float32).tiny))
        worst = np.maximum(worst, difference.max(axis=1, initial=0.0) / scale)
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

    from tome_export.reducers.base import Place, ScoredReducer

    reducer = cast(ScoredReducer, model.settings.reducer)
    counts = model.layers[layer]
    place = Place(
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
    if not sound:
        return [Disagreement(image, -1, "structure", np.inf)]
    ours, theirs = expected.targets, plan.targets
    found = []

    def add(token: int, kind: Kind) -> None:
        found.append(Disagreement(image, token, kind, error))

    for token in sorted(ours.keys() | theirs.keys()):
        if (token in ours) != (token in theirs):
            add(token, "selection")
        elif ours[token] != theirs[token]:
            add(token, "destination")
    if not found and not np.array_equal(plan.keep, expected.keep):
        moved = np.flatnonzero(plan.keep != expected.keep)
        found += [Disagreement(image, int(plan.keep[i]), "order", error) for i in moved]
    return found
