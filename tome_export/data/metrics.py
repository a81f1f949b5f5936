"""Shares with their confidence intervals."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tome_export.artifact.evaluation import Deviations, Difference, Mean, Methods, Share

CONFIDENCE = 0.95

MOST_RESAMPLED = 1_000_000
"""Numbers of resamples that are held at a time."""

_EQUAL = 1e-12
"""Range of values that are one value but for rounding, whose mean has no other."""

METHODS = Methods(
    share="Wilson 1927, score interval",
    difference="Newcombe 1998, paired score interval (method 10)",
)


def share_of(right: NDArray[np.bool_], confidence: float = CONFIDENCE) -> Share:
    """The share of images that are right, ``right [B]``."""
    correct, images = int(np.count_nonzero(right)), len(right)
    low, high = wilson(correct, images, confidence)
    return Share(correct=correct, images=images, share=correct / images, low=low, high=high)


def wilson(correct: int, images: int, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Score interval of a share: Wilson, JASA 22 (1927) 209-212.

    It stays within 0 and 1 and holds its coverage also near them, where the textbook's normal
    interval has no width.
    """
    from scipy.stats import binomtest

    limits = binomtest(correct, images).proportion_ci(confidence, method="wilson")
    return float(limits.low), float(limits.high)


def paired_difference(
    first: NDArray[np.bool_], second: NDArray[np.bool_], confidence: float = CONFIDENCE
) -> Difference:
    """Difference of two shares over the same images, ``[B]`` each.

    Both shares' Wilson limits joined by their correlation, with a continuity correction of it:
    method 10 of Newcombe, Statistics in Medicine 17 (1998) 2635-2650.
    """
    both = int(np.count_nonzero(first & second))
    gained = int(np.count_nonzero(first & ~second))
    lost = int(np.count_nonzero(~first & second))
    return difference_of_counts(both, gained, lost, len(first) - both - gained - lost, confidence)


def difference_of_counts(
    both: int, gained: int, lost: int, neither: int, confidence: float = CONFIDENCE
) -> Difference:
    """``paired_difference`` from the cells of the two by two table."""
    images = both + gained + lost + neither
    p, q = (both + gained) / images, (both + lost) / images
    p_low, p_high = wilson(both + gained, images, confidence)
    q_low, q_high = wilson(both + lost, images, confidence)
    margins = (both + gained) * (lost + neither) * (both + lost) * (gained + neither)
    excess: float = both * neither - gained * lost
    if excess > 0:
        excess = max(excess - images / 2, 0.0)
    phi = excess / math.sqrt(margins) if margins else 0.0

    def joined(a: float, b: float) -> float:
        return math.sqrt(max(a * a - 2 * phi * a * b + b * b, 0.0))

    share = (gained - lost) / images
    low = share - joined(p - p_low, q_high - q)
    high = share + joined(p_high - p, q - q_low)
    return Difference(share=share, low=low, high=high, gained=gained, lost=lost)


def mean_of(values: NDArray[np.float64], confidence: float = CONFIDENCE) -> Mean:
    """The mean over at least two images, ``values [B]``, with its interval.

    It is the bias-corrected and accelerated bootstrap over the images of Efron, JASA 82 (1987)
    171-185. Similarities to the unmerged model lie skewed below 1, where an interval of normal
    theory would reach above it. The same values always have the same interval.
    """
    from scipy.stats import bootstrap

    mean = float(values.mean())
    if np.ptp(values) <= _EQUAL:
        return Mean(mean=mean, low=mean, high=mean)
    # Resamples of all images at once take gigabytes for some thousands of them.
    batch = max(1, MOST_RESAMPLED // len(values))
    found = bootstrap((values,), np.mean, batch=batch, confidence_level=confidence, rng=0)
    interval = found.confidence_interval
    return Mean(mean=mean, low=float(interval.low), high=float(interval.high))


def cosines(found: NDArray[Any], other: NDArray[Any]) -> NDArray[np.float64]:
    """Cosine of each image's features to another model's ``[B]``; NaN where one has no direction.

    Features are ``[B, C]``, or ``[B, P, C]`` of patches, whose mean cosine it is.
    """
    each = (unit_vectors(found) * unit_vectors(other)).sum(axis=-1)
    return np.asarray(each.reshape(len(each), -1).mean(axis=1))


def correlations(found: NDArray[Any], other: NDArray[Any]) -> NDArray[np.float64]:
    """Pearson's correlation of each image's map ``[B, ...]`` with another model's ``[B]``.

    It is over all numbers of the map, and NaN where one is constant.
    """
    with np.errstate(invalid="ignore"):  # of infinite numbers, which come out as NaN
        # One by one: a segmentation's map of one image may be of gigabytes in float64.
        pairs = zip(found, other, strict=True)
        return np.array([_centred(a) @ _centred(b) for a, b in pairs], np.float64)


def unit_vectors(features: NDArray[Any]) -> NDArray[np.float64]:
    """Vectors ``[..., C]`` of length 1; NaN for those of zeros or of what is not finite."""
    with np.errstate(invalid="ignore"):
        return _of_length_1(features.astype(np.float64), 0.0)


def _centred(image_map: NDArray[Any]) -> NDArray[np.float64]:
    """Direction ``[C]`` of a map less its mean."""
    flat = image_map.ravel().astype(np.float64)
    # What is left of a constant map is the rounding of its numbers.
    least = np.finfo(np.float32).eps * float(np.linalg.norm(flat))
    return _of_length_1(flat - flat.mean(), least)


def _of_length_1(vectors: NDArray[np.float64], least: float) -> NDArray[np.float64]:
    length = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return np.asarray(vectors / np.where(length > least, length, np.nan))


def deviations(found: NDArray[Any], other: NDArray[Any]) -> Deviations | None:
    """How far numbers ``[B, K]`` are from another model's; None where no image has finite ones."""
    finite = np.isfinite(found).all(axis=1) & np.isfinite(other).all(axis=1)
    if not finite.any():
        return None
    apart = np.abs(found[finite] - other[finite])
    spread = float(other[finite].std(axis=0).mean())
    return Deviations(mean=float(apart.mean()), max=float(apart.max()), spread=spread)
