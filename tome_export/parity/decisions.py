"""Comparing merge decisions one by one, each with the score margin it hangs on."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np

from tome_export.artifact.parity import Disagreement, Kind

Array = np.ndarray[Any, Any]


@dataclass(frozen=True, eq=False)
class Plan:
    """One image's plan: ``keep [K]``, ``src [r]``, ``dst [r]`` as in ``MergePlan``.

    Two are equal if they keep the same tokens in the same order and fold the others alike.
    """

    keep: Array
    src: Array
    dst: Array

    @property
    def targets(self) -> dict[int, int]:
        """Input index of each removed token -> that of the token it merges into, -1 if dropped.

        A position that is none gives -2, which is no token either.
        """
        inside = (self.dst >= 0) & (self.dst < len(self.keep))
        into = np.where(self.dst == -1, -1, -2)
        into[inside] = self.keep[self.dst[inside]]
        return dict(zip(self.src.tolist(), into.tolist(), strict=True))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Plan):
            return NotImplemented
        return np.array_equal(self.keep, other.keep) and self.targets == other.targets

    __hash__ = None  # type: ignore[assignment]


def cosine_scores(metric: Array, prefix: int) -> Array:
    """Scores ``[ceil(N/2), floor(N/2)]`` float64 of set A against B; prefix tokens are -inf."""
    metric = metric.astype(np.float64)
    metric = metric / np.maximum(np.linalg.norm(metric, axis=-1, keepdims=True), 1e-12)
    scores: Array = metric[::2] @ metric[1::2].T
    scores[: (prefix + 1) // 2] = -np.inf
    scores[:, : prefix // 2] = -np.inf
    return scores


def disagreements(
    reference: Plan, candidate: Plan, scores: Array, prefix: int, class_token: bool, image: int
) -> list[Disagreement]:
    """Every decision in which two plans over the same tokens differ."""
    value = scores.max(axis=1, initial=-np.inf)
    ranked = np.sort(value)[::-1]
    r = len(reference.src)
    found: list[Disagreement] = []

    def add(token: int, kind: Kind, margin: float) -> None:
        found.append(Disagreement(image=image, token=token, kind=kind, margin=float(margin)))

    if not _is_sound(candidate, reference, prefix, class_token):
        add(-1, "structure", np.inf)
        return found
    ours, theirs = reference.targets, candidate.targets
    for token in sorted(ours.keys() - theirs.keys()):
        add(token, "selection", value[token // 2] - ranked[r])
    for token in sorted(theirs.keys() - ours.keys()):
        add(token, "selection", ranked[r - 1] - value[token // 2])
    for token in sorted(ours.keys() & theirs.keys()):
        if ours[token] != theirs[token]:
            row = scores[token // 2]
            add(token, "destination", row[ours[token] // 2] - row[theirs[token] // 2])
    if not class_token:
        stay = [t for t in candidate.keep[prefix:].tolist() if t % 2 == 0]
        wanted = {t: i for i, t in enumerate(reference.keep.tolist())}
        for left, right in itertools.pairwise(stay):
            both = left in wanted and right in wanted
            if both and wanted[left] > wanted[right]:
                add(left, "order", value[right // 2] - value[left // 2])
    return found


def _is_sound(candidate: Plan, reference: Plan, prefix: int, class_token: bool) -> bool:
    """Whether the candidate is a plan at all: the invariant, the fixed parts, the range of dst."""
    tokens = len(reference.keep) + len(reference.src)
    members = np.sort(np.concatenate([candidate.keep, candidate.src]))
    if not np.array_equal(members, np.arange(tokens)):
        return False
    odd = np.arange(1, tokens, 2)
    odd = odd[odd >= prefix]
    stay = candidate.keep[prefix : len(candidate.keep) - len(odd)]
    return bool(
        np.array_equal(candidate.keep[:prefix], np.arange(prefix))
        and np.array_equal(candidate.keep[len(candidate.keep) - len(odd) :], odd)
        and (stay % 2 == 0).all()
        and (not class_token or (np.diff(stay) > 0).all())
        and (candidate.src % 2 == 0).all()
        and (candidate.dst >= len(candidate.keep) - len(odd)).all()
        and (candidate.dst < len(candidate.keep)).all()
    )
