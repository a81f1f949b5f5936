"""``eval.json``: accuracy of an artifact, against the unmerged model and PyTorch."""

from __future__ import annotations

from typing import ClassVar, Literal

from tome_export.artifact.document import Count, Document, Part, Text
from tome_export.artifact.environment import Environment

EVAL = "eval.json"


class Share(Part):
    """A share of images, ``correct / images``, with the limits of its interval."""

    correct: Count
    images: Count
    share: float
    low: float
    high: float


class Difference(Part):
    """A difference of two shares of the same images, first minus second, with its interval.

    Attributes:
        share: Difference of the shares.
        low: Lower limit.
        high: Upper limit.
        gained: Images that only the first has right.
        lost: Images that only the second has right.
    """

    share: float
    low: float
    high: float
    gained: Count
    lost: Count


class Mean(Part):
    """A mean over images with its interval, see ``data.metrics.mean_of``.

    For a difference the images are paired: it is the mean of each image's own difference.
    """

    mean: float
    low: float
    high: float


class Similarities(Part):
    """Mean and smallest similarity, such as a cosine, of outputs for some images to another's."""

    mean: float
    min: float


class Deviations(Part):
    """How far a model's numbers are from those of another model, on some images.

    Attributes:
        mean: Mean absolute difference.
        max: Largest absolute difference.
        spread: Standard deviation of the other model's numbers over the images, to compare with.
    """

    mean: float
    max: float
    spread: float


class UnreadableImage(Part):
    """An image that was left out, and why."""

    name: Text
    reason: Text


class EvaluationData(Part):
    """What was evaluated on.

    Attributes:
        source: Name that the user gave.
        kind: ``folder``, ``tar``, ``parquet`` or ``samples``.
        images: Number of images that could be read.
        labelled: Whether they have labels.
        unreadable: Images that could not be read.
        unreadable_count: Number of these.
        notes: What a reader should know of the images or labels.
    """

    source: Text
    kind: str
    images: Count
    labelled: bool
    unreadable: tuple[UnreadableImage, ...]
    unreadable_count: Count
    notes: tuple[Text, ...]


class CandidateResult(Part):
    """What was found of one model; what was not asked or cannot be told is None.

    Attributes:
        name: ``merged``, ``unmerged``, ``torch`` or ``r=4``.
        r: Tokens merged per layer.
        backend: What ran it.
        macs: Multiply-accumulates per image.
        top1: Images whose best class is their label.
        top5: Images whose label is among the best five.
        agreement_with_unmerged: Images whose best class is that of the unmerged model; where there
            is a yes or no for each class, those with the same answer for all.
        difference_to_unmerged: Top-1 minus that of the unmerged model.
        cosine_to_unmerged: Cosines to the features of the unmerged model.
        correlation_to_unmerged: Pearson correlations to the maps of the unmerged model.
        deviation_from_unmerged: How far the numbers of a regression, or the probability of a yes
            where there is one logit, are from the unmerged model's.
        not_finite: Images for which it gave no finite numbers.
    """

    name: str
    r: tuple[Count, ...]
    backend: str
    macs: Count
    top1: Share | None = None
    top5: Share | None = None
    agreement_with_unmerged: Share | None = None
    difference_to_unmerged: Difference | None = None
    cosine_to_unmerged: Similarities | None = None
    correlation_to_unmerged: Similarities | None = None
    deviation_from_unmerged: Deviations | None = None
    not_finite: Count


class Methods(Part):
    """How the intervals of shares and of differences were made."""

    share: str
    difference: str


class Evaluation(Document):
    """The content of ``eval.json``.

    Attributes:
        format: Version of this file.
        data: What was evaluated on.
        classes: Number of classes of the model, two where there is one logit; None if it gives
            features or a regression's numbers.
        candidates: Results of the models, the artifact's first.
        confidence: Level of the intervals.
        methods: How the intervals were made.
        batch: Images per run.
        environment: Where it was evaluated.
    """

    remedy: ClassVar[str] = "run 'tome-export eval' of this version again"

    format: Literal[1] = 1
    data: EvaluationData
    classes: Count | None
    candidates: tuple[CandidateResult, ...]
    confidence: float
    methods: Methods
    batch: Count
    environment: Environment
