"""The policies of a cascade: which member an image is given to, and whether it goes on to the next.

Members are artifacts of one model, by MACs ascending; a budget is the index of one. A served
cascade has a copy of this file beside its python model, so that both compute the same numbers: it
needs the standard library and NumPy only.

``complexity``: an image begins and ends at the member that its complexity falls to. The score is
the mean absolute difference of neighbouring preprocessed pixels, the anisotropic total variation
per pixel (Rudin, Osher and Fatemi, Physica D 60 (1992), with the sum of absolute values in place
of the length of the gradient): for an image x ``[C, H, W]``

    s = 1/2 (mean |x[c, i+1, j] - x[c, i, j]| + mean |x[c, i, j+1] - x[c, i, j]|)

``confidence``: every image begins at the lowest member and goes on to the next while it is unsure
(early exit; Teerapittayanon et al., BranchyNet, 2016). Sure is whose largest softmax probability,
or whose lead of the largest over the second (``margin``), reaches the member's threshold.

``learned``: a linear head on the patch embedding, averaged over patches, scores each member; taken
is the best of score minus price times the member's share of the largest MACs. Embedding and average
are both linear, so the average of the embeddings is the embedding of the average patch, and both
are folded into one matrix on the average patch.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]


def settings_from_json(text: str) -> Any:
    """A policy of ``artifact.cascade``, or a served ``cascade.json``, where neither can be had."""
    return json.loads(text, object_hook=lambda entries: SimpleNamespace(**entries))


def first_budgets(settings: Any, pixels: Array) -> Array:
    """The member that each image of ``pixels [B, C, H, W]`` begins at: ``[B]`` int64.

    ``settings`` is a policy of ``artifact.cascade``, or from ``settings_from_json``; what they hold
    as ``pixels`` says how uint8 pixels are normalised.
    """
    if settings.policy == "confidence":
        return np.zeros(len(pixels), np.int64)
    pixels = normalised(pixels, getattr(settings, "pixels", None))
    if settings.policy == "complexity":
        return by_thresholds(complexity(pixels), settings.thresholds)
    scores = head_scores(mean_patch(pixels, settings.patch), settings.weights, settings.bias)
    return by_price(scores, settings.shares, settings.price)


def normalised(pixels: Array, preprocessing: Any) -> Array:
    """Pixel values in the form that a model takes them, as ``[B, C, H, W]`` float32, normalised.

    Without a preprocessing they are that already.
    """
    if preprocessing is None or preprocessing.form == "float32":
        return pixels
    pixels = pixels.transpose(0, 3, 1, 2) if preprocessing.form == "uint8" else pixels
    mean, std = (
        np.array(values, np.float32)[:, None, None]
        for values in (preprocessing.mean, preprocessing.std)
    )
    return np.asarray((pixels.astype(np.float32) / np.float32(255) - mean) / std)


def goes_on(settings: Any, budget: int, logits: Array) -> Array:
    """Which images go on to the next member, from this one's ``logits [B, K]``: ``[B]`` bool."""
    if settings.policy != "confidence" or budget >= len(settings.thresholds):
        return np.zeros(len(logits), np.bool_)
    return is_unsure(confidence(logits, settings.measure), settings.thresholds[budget])


def complexity(pixels: Array) -> Array:
    """The score s of each image of ``pixels [B, C, H, W]``: ``[B]`` float64.

    An image's score does not depend on the others of its batch: each is summed by itself, in
    float64. A side of one pixel has no differences and counts as 0.
    """
    scores = np.zeros(len(pixels))
    for index, image in enumerate(pixels):
        x = np.asarray(image, np.float64)
        for axis in (1, 2):
            steps = np.ascontiguousarray(np.abs(np.diff(x, axis=axis))).reshape(-1)
            scores[index] += 0.5 * steps.mean() if len(steps) else 0.0
    return scores


def by_thresholds(scores: Array, thresholds: Sequence[float]) -> Array:
    """How many of the ascending thresholds each score ``[B]`` reaches: ``[B]`` int64.

    A score that is no number gets the largest budget.
    """
    found = np.searchsorted(np.asarray(thresholds, np.float64), scores, side="right")
    return np.asarray(found, np.int64)


def confidence(logits: Array, measure: str) -> Array:
    """How sure a member is of each image, of its ``logits [B, K]``: ``[B]`` float64 from 0 to 1.

    The measure is ``max`` or ``margin``. A row of logits that is not finite gives NaN.
    """
    wide = two_classes(np.asarray(logits, np.float64))
    finite = np.asarray(np.isfinite(wide).all(axis=1))
    safe = np.where(finite[:, None], wide, 0.0)
    best = np.sort(np.exp(log_softmax(safe)), axis=1)[:, -2:]
    lead = best[:, -1] - best[:, 0] if best.shape[1] > 1 else best[:, -1]
    found = best[:, -1] if measure == "max" else lead
    return np.asarray(np.where(finite, found, np.nan), np.float64)


def two_classes(logits: Array) -> Array:
    """Logits ``[B, 2]`` of no and yes of one logit ``[B, 1]``, whose softmax is its sigmoid.

    Those of more classes are returned as they are.
    """
    one = logits.shape[1] == 1
    return np.concatenate([np.zeros_like(logits), logits], axis=1) if one else logits


def log_softmax(logits: Array) -> Array:
    """Log probabilities ``[B, K]`` float64 of finite ``logits [B, K]``."""
    wide = np.asarray(logits, np.float64)
    shifted = wide - wide.max(axis=1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True)))


def is_unsure(sureness: Array, threshold: float) -> Array:
    """Whether confidences ``[B]`` are under a threshold; one that is no number always is."""
    return np.asarray(~(sureness >= threshold), np.bool_)


def mean_patch(pixels: Array, patch: Sequence[int]) -> Array:
    """The average patch of each image of ``pixels [B, C, H, W]``: ``[B, C * h * w]`` float64.

    What does not fill a patch of height h and width w at the right and the bottom is left out, as
    by the model's own embedding.
    """
    h, w = patch
    count, channels, height, width = pixels.shape
    rows, columns = height // h, width // w
    whole = np.asarray(pixels[:, :, : rows * h, : columns * w], np.float64)
    cut = whole.reshape(count, channels, rows, h, columns, w)
    return np.asarray(cut.mean(axis=(2, 4)).reshape(count, channels * h * w))


def head_scores(patches: Array, weights: Any, bias: Any) -> Array:
    """Score ``[B, M]`` float64 of each member for average patches ``[B, P]``.

    The weights ``[M, P]`` are those of head times embedding; the bias is ``[M]``.
    """
    scores = patches @ np.asarray(weights, np.float64).T + np.asarray(bias, np.float64)
    return np.asarray(scores)


def by_price(scores: Array, shares: Any, price: float) -> Array:
    """The member ``[B]`` int64 of the best score ``[B, M]`` less the price of its share ``[M]``.

    A row with a score that is no number gets the largest budget.
    """
    net = scores - price * np.asarray(shares, np.float64)
    best = np.where(np.isnan(net).any(axis=1), net.shape[1] - 1, np.argmax(net, axis=1))
    return np.asarray(best, np.int64)
