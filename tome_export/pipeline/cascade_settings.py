"""The settings of a policy that are tried, and what the policy itself costs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from tome_export.artifact import Artifact
from tome_export.cascade.candidates import (
    complexity_settings,
    confidence_settings,
    learned_settings,
)
from tome_export.cascade.outcome import Observations, Settings

if TYPE_CHECKING:
    from tome_export.pipeline.cascade import CascadeRequest

TARGETS = 5
"""Mean costs that heads are trained for, where the target is an accuracy."""

Embedding = tuple[NDArray[np.float64], NDArray[np.float64]]


@dataclass(frozen=True)
class Trial:
    """What is tried, and on what.

    Attributes:
        settings: The policy at every threshold that is worth a try.
        seen: The images that the thresholds are calibrated on.
        fitted: Images, of those given, that a head was trained on instead.
    """

    settings: Sequence[Settings]
    seen: Observations
    fitted: int


def embedding_of(artifact: Artifact, policy: str) -> Embedding | None:
    """The patch embedding, where the policy looks at it.

    Raises:
        InputError: if the model does not begin with one.
    """
    if policy != "learned":
        return None
    from tome_export.onnx.patch_embedding import patch_embedding

    return patch_embedding(artifact.model_path)


def policy_macs_of(artifact: Artifact, members: int, embedding: Embedding | None, name: str) -> int:
    """What the policy itself takes per image, every addition counted as a multiply-accumulate.

    ``complexity``: two differences and two sums per pixel and axis at most. ``learned``: the
    average patch, one addition per pixel, and the folded matrix on it. ``confidence``: none, a
    softmax is not counted in the models either.
    """
    pixels: int = math.prod(artifact.manifest.preprocessing.input_size)
    if name == "complexity":
        return 4 * pixels
    if embedding is None:
        return 0
    patch: int = math.prod(embedding[0].shape[1:])
    return pixels + members * patch


def trial_of(
    request: CascadeRequest, seen: Observations, macs: Sequence[int], embedding: Embedding | None
) -> Trial:
    """The settings to try on calibration images.

    A learned policy is trained on the first half of them, and its price calibrated on the rest.

    Args:
        request: Policy, goal and their numbers.
        seen: The calibration images, in random order.
        macs: Of each member, ascending.
        embedding: From ``embedding_of``.
    """
    if request.policy == "complexity":
        return Trial(complexity_settings(seen), seen, 0)
    if embedding is None:
        return Trial(confidence_settings(seen, request.measure), seen, 0)
    from tome_export.pipeline.cascade_predictor import trained_head

    half = len(seen) // 2
    rows = np.arange(len(seen), dtype=np.int64)
    fit, rest = seen.take(rows[:half]), seen.take(rows[half:])
    shares = [count / macs[-1] for count in macs]
    budget = request.goal.budget(macs[-1])
    targets = (
        np.linspace(shares[0], 1.0, TARGETS).tolist() if budget is None else [budget / macs[-1]]
    )
    patch = list(embedding[0].shape[2:])
    settings: list[dict[str, Any]] = []
    for target in targets:
        head = trained_head(fit, embedding, shares, target, request.strength)
        settings += [{**one, "patch": patch} for one in learned_settings(rest, head, shares)]
    return Trial(settings, rest, half)
