"""What a model says of an image, for people: labels with scores, or features."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tome_export.data.scores import count_of, top_k

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from tome_export.artifact import Manifest


@dataclass(frozen=True)
class Label:
    """One of the best classes: its name (its number if it has none), score, row of the logits.

    The score is a probability, or of a regression the number itself.
    """

    label: str
    score: float
    index: int


@dataclass(frozen=True)
class ImageAnswer:
    """What a model says about one image or video file.

    A classifier gives labels, best first; a tower features by the names of its outputs.
    """

    image: Path
    labels: list[Label] | None
    features: dict[str, NDArray[Any]] = field(default_factory=dict)


def names_of_classes(manifest: Manifest) -> tuple[str, ...]:
    """Of each class of the output ``[B, K, ...]`` its name, or its number where it has none."""
    return manifest.labels or tuple(map(str, range(int(manifest.output.shape[1]))))


def labels_from_logits(manifest: Manifest, logits: NDArray[Any], top: int) -> list[list[Label]]:
    """The best classes of each image by its finite ``logits [B, K]``, as many as there are.

    Of a regression these are all numbers, in their order.
    """
    activation, names = manifest.activation or "none", names_of_classes(manifest)
    found = top_k(logits, count_of(top, len(names), activation), activation)
    return [
        [Label(names[i], s, i) for i, s in zip(index, score, strict=True)]
        for index, score in zip(*(array.tolist() for array in found), strict=True)
    ]
