"""``cascade.json``: a calibrated cascade, and how it does on images it was not calibrated on."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from tome_export.artifact.document import Count, Document, Part, Text, Whole
from tome_export.artifact.environment import Environment
from tome_export.artifact.evaluation import Difference, Methods, UnreadableImage
from tome_export.artifact.goal import Metric, TargetKind
from tome_export.artifact.manifest import Absent
from tome_export.spec import Precision

CASCADE = "cascade.json"

ConfidenceMeasure = Literal["max", "margin"]
PolicyName = Literal["complexity", "confidence", "learned"]


class ComplexityPolicy(Part):
    """Gives an image to the member that its complexity falls to, by ascending thresholds."""

    policy: Literal["complexity"] = "complexity"
    thresholds: tuple[float, ...]


class ConfidencePolicy(Part):
    """Gives an image to one member after the other until one is sure.

    Attributes:
        measure: The largest probability, or its lead over the second.
        thresholds: Confidence from which on a member is sure, for each but the last.
    """

    policy: Literal["confidence"] = "confidence"
    measure: ConfidenceMeasure
    thresholds: tuple[float, ...]


class LearnedPolicy(Part):
    """Gives an image to the member of the best score less the price of its MACs.

    Attributes:
        weights: Head times patch embedding, ``[M][P]``.
        bias: Constant of each member's score, ``[M]``.
        shares: MACs of each member over the largest's, ``[M]``.
        price: What all MACs of the largest member cost.
        patch: Height and width of a patch in pixels.
    """

    policy: Literal["learned"] = "learned"
    weights: tuple[tuple[float, ...], ...]
    bias: tuple[float, ...]
    shares: tuple[float, ...]
    price: float
    patch: tuple[Count, Count]


Policy = ComplexityPolicy | ConfidencePolicy | LearnedPolicy
"""What decides which member an image gets, with its thresholds; see ``cascade.policy``."""


class CascadeTarget(Part):
    """The target as in ``goal.Goal``, and in words."""

    kind: TargetKind
    value: float
    text: str


class CascadeShare(Part):
    """A member alone on some images: as ``CascadeScore``, with the limits of its share."""

    correct: Count | None
    images: Count
    share: float
    low: float
    high: float


class CascadeMember(Part):
    """An artifact of the cascade.

    Attributes:
        artifact: Directory of the artifact.
        schedule: How it merges, for people.
        r: Tokens removed in each layer.
        macs: Multiply-accumulates per image.
        calibration: What it alone has right of the calibration images.
        test: What it alone has right of the test images.
    """

    artifact: Text
    schedule: str
    r: tuple[Count, ...]
    precision: Precision
    macs: Count
    calibration: CascadeShare
    test: CascadeShare


class CascadeScore(Part):
    """A setting of the policy on some images.

    Attributes:
        macs: Mean multiply-accumulates per image, those of the policy included.
        correct: Images that are right; None where similarity is told, of models without classes.
        share: Share of the images that are right, or their mean similarity.
    """

    macs: float
    correct: Count | None
    images: Count
    share: float

    @property
    def total(self) -> float:
        """The sum over the images of what counts."""
        return self.share * self.images if self.correct is None else self.correct


class CascadeTest(CascadeScore):
    """The chosen setting on the test images, with the limits of its share.

    Attributes:
        budgets: Images whose answer is that of each member.
        difference_to_highest: Its share minus that of the member of the most MACs alone; None where
            similarity to that member is told.
        met: Whether the target holds on these images.
    """

    low: float
    high: float
    budgets: tuple[Count, ...]
    difference_to_highest: Difference | None
    met: bool


class ChosenSetting(Part):
    """The chosen setting on the images that it was chosen on, and on others."""

    calibration: CascadeScore
    test: CascadeTest


class SingleMember(Part):
    """The cheapest member that alone is as accurate as the cascade on the test images.

    Attributes:
        saved: Share of its MACs that the cascade does without; below 0 if it takes more.
    """

    artifact: Text
    macs: Count
    share: float
    saved: float


class SweepPoint(Part):
    """A setting that no other beats on the calibration images.

    Attributes:
        thresholds: Thresholds of the policy; None where it has a price.
        price: That of a learned policy; None where it has thresholds.
    """

    thresholds: tuple[float, ...] | None = Absent
    price: float | None = Absent
    calibration: CascadeScore
    test: CascadeScore
    chosen: bool


class CascadeData(Part):
    """The images.

    Attributes:
        source: What was given.
        test_source: What was given to test on; None if a part of ``source`` was kept for it.
        fitted: Images that the head of a learned policy was trained on.
        calibration: Images that the thresholds were calibrated on.
        test: Images that were measured on, and nothing else.
        seed: Seed of the order and the split of the images.
    """

    source: Text
    test_source: Text | None
    fitted: Count
    calibration: Count
    test: Count
    seed: Whole
    unreadable: tuple[UnreadableImage, ...]
    notes: tuple[Text, ...]


class ServedCascade(Part):
    """The cascade in a model repository.

    Attributes:
        models: Names of all that belongs to the cascade, each after those that it needs.
        entry: The one a client asks.
    """

    repository: Text
    models: tuple[str, ...]
    entry: str
    notes: tuple[str, ...]


class Cascade(Document):
    """The content of ``cascade.json``.

    Attributes:
        model: The model that all members are artifacts of.
        random_weights: Whether its weights are random, and so not meant for use.
        metric: ``top1``, or ``agreement`` with the highest member where there are no labels; of
            models without classes mean ``similarity`` to its output, each image's from 0 to 1: the
            cosine of features, or the correlation of maps.
        settings: The policy with the thresholds that were chosen.
        policy_macs: Multiply-accumulates per image of the policy itself.
        members: The members by MACs ascending.
        single: The member to take instead; None if none is as accurate.
        sweep: The settings that no other beats, cheapest first.
        backend: What ran the members.
        confidence: Level of the intervals, which ``methods`` says how to make.
        served: What is in the repository; None if none was asked for.
    """

    remedy: ClassVar[str] = "run 'tome-export cascade' of this version again"

    format: Literal[1] = 1
    model: str
    random_weights: bool
    policy: PolicyName
    metric: Metric
    target: CascadeTarget
    settings: Annotated[Policy, Field(discriminator="policy")]
    policy_macs: Count
    members: tuple[CascadeMember, ...]
    chosen: ChosenSetting
    single: SingleMember | None
    sweep: tuple[SweepPoint, ...]
    data: CascadeData
    backend: str
    confidence: float
    methods: Methods
    environment: Environment
    served: ServedCascade | None = Absent
