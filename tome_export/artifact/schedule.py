"""``schedule.json``: r of every layer, and the search that found it if one did."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

from pydantic import Field, PrivateAttr, field_validator, model_validator

from tome_export.artifact.document import Count, Document, Measured, Part, SizeText, Text
from tome_export.artifact.environment import Environment
from tome_export.artifact.evaluation import Difference, Mean, Share
from tome_export.artifact.goal import Goal, Metric
from tome_export.artifact.manifest import Absent, Component
from tome_export.errors import InputError
from tome_export.spec import ImageSize, Precision

SCHEDULE = "schedule.json"

Read = TypeVar("Read", bound="ScheduleFile")

Method = Literal["constant", "decreasing", "increasing", "free"]


class ScheduleWeights(Part):
    """The weights that a schedule was found with, as in ``manifest.Weights``."""

    kind: str | None = Absent
    source: Text | None = Absent
    state_sha256: str | None = Absent


class ScheduleReducer(Component):
    """The reducer that a schedule is for."""

    options: dict[str, Any] = Field(default_factory=dict)

    @property
    def without_place(self) -> tuple[str, dict[str, Any]]:
        """Name and options, wherever its weights are."""
        return self.name, {k: v for k, v in self.options.items() if k != "weights"}


class ScheduleFile(Document):
    """What a build takes: all of a schedule that somebody wrote by hand.

    Attributes:
        model: Recipe that the schedule is for.
        schedule: r of every layer.
        tokens_in: Tokens that enter the model's first layer.
        image_size: Height and width of the images that it was found with.
        weights: The weights of the search.
        reducer: How tokens become fewer.
    """

    remedy: ClassVar[str] = "write it with 'tome-export tune'"

    format: Literal[1]
    model: str
    schedule: tuple[Count, ...]
    tokens_in: Count | None = Absent
    image_size: SizeText | None = Absent
    weights: ScheduleWeights | None = Absent
    reducer: ScheduleReducer | None = Absent
    _file: Path = PrivateAttr(default=Path(SCHEDULE))

    @classmethod
    def read(cls: type[Read], file: Path) -> Read:
        """Read a file, which the messages of the checks then name."""
        found = super().read(file)
        found._file = file
        return found

    @field_validator("schedule")
    @classmethod
    def _counts(cls, schedule: tuple[int, ...]) -> tuple[int, ...]:
        if not schedule or min(schedule) < 0:
            raise ValueError("one whole number, 0 or more, per layer")
        return schedule

    @property
    def _option(self) -> str:
        return f"--schedule {','.join(map(str, self.schedule))}"

    def check_model(self, model: str) -> None:
        """Raise ``InputError`` unless this is the recipe's name."""
        if model != self.model:
            raise InputError(
                f"schedule file {self._file} is for {self.model}, not for {model}; tune {model}, "
                f"or give the numbers themselves: {self._option}"
            )

    def check_reducer(self, reducer: Mapping[str, Any]) -> None:
        """Raise ``InputError`` unless name and options agree, wherever weights are by now."""
        wanted, given = self.reducer, ScheduleReducer.model_validate_json(json.dumps(reducer))
        if wanted is not None and wanted.without_place != given.without_place:
            raise InputError(
                f"schedule file {self._file} is for --reducer {wanted.name} with options "
                f"{json.dumps(wanted.options)}; give the same here, or the numbers themselves: "
                f"{self._option}"
            )

    def check_image_size(self, image_size: ImageSize) -> None:
        """Raise ``InputError`` unless it was found with images of this size."""
        if self.image_size not in (None, str(image_size)):
            raise InputError(
                f"schedule file {self._file} is for images of {self.image_size}, and {self.model} "
                f"takes {image_size} here; give --image-size {self.image_size}, or tune it "
                "again at this image size"
            )

    def check_depth(self, depth: int) -> None:
        """Raise ``InputError`` unless the model has so many layers as the schedule."""
        if depth != len(self.schedule):
            raise InputError(
                f"schedule file {self._file} has {len(self.schedule)} layers; {self.model} has "
                f"{depth}, tune it again"
            )

    def check_tokens(self, tokens_in: int, merged: Sequence[int]) -> None:
        """Raise ``InputError`` for a model of other tokens, or one that cannot merge as many.

        ``merged`` is r as the model merges in each layer, given this schedule.
        """
        if self.tokens_in not in (None, tokens_in):
            raise InputError(
                f"schedule file {self._file} is for {self.tokens_in} tokens; {self.model} has "
                f"{tokens_in} here, tune it again at this image size"
            )
        for layer, (wanted, able) in enumerate(zip(self.schedule, merged, strict=True)):
            if wanted != able:
                raise InputError(
                    f"schedule file {self._file} merges {wanted} tokens in layer {layer}, where "
                    f"{self.model} can merge {able}; tune it again, or give a list with "
                    "--schedule, which is cut to what is possible"
                )

    def note(self, state_sha256: str) -> str | None:
        """What to tell of a model whose weights, by their digest, are not those of the search."""
        known = None if self.weights is None else self.weights.state_sha256
        if known in (None, state_sha256):
            return None
        return (
            f"{self._file.name} was found with other weights: its accuracy is not that of this "
            "model, tune again to know"
        )


class Objective(Goal):
    """The target, in words too.

    Attributes:
        metric: What is counted of an image.
    """

    metric: Metric
    text: str


class Similarity(Part):
    """How similar outputs are to those of the unmerged model on the same images.

    It is the cosine of an image's features, for features of patches its mean over the patches, or
    Pearson's correlation of a map over all its numbers.

    Attributes:
        mean: Mean over the images.
        lowest: That of the image with the lowest.
        mean_absolute_difference: Mean over the numbers of all images' maps; of maps only.
    """

    mean: float
    lowest: float
    mean_absolute_difference: float | None = Absent


class TunedPoint(Part):
    """A schedule, measured on the images that the choice was made on.

    Attributes:
        method: What proposed it.
        macs: Multiply-accumulates per image.
        latency_ms: Milliseconds per batch by the cost table, measured where the point is that of
            ``found``; None if latency was not asked for.
        accuracy: Share of the images that are right, or whose nearest neighbour is the unmerged
            model's; ``correct`` is how many. Absent where similarity is what is counted.
        similarity: To the unmerged model's outputs; absent for classifiers.
        damage: Mean Kullback-Leibler divergence from the unmerged model, in nats; one minus the
            mean similarity where there are no classes.
        entropy: Least token-size entropy of any search image, 0 to 1.
    """

    schedule: tuple[Count, ...]
    method: Method
    macs: Count
    latency_ms: float | None
    accuracy: float | None = Absent
    correct: Count | None = Absent
    similarity: Similarity | None = Absent
    damage: Measured
    entropy: Measured
    chosen: bool

    @property
    def counted(self) -> float:
        """Mean over the images of what the objective's metric counts of each."""
        if self.accuracy is not None:
            return self.accuracy
        assert self.similarity is not None  # noqa: S101 - see ``_has_a_measure``
        return self.similarity.mean

    @model_validator(mode="after")
    def _has_a_measure(self) -> TunedPoint:
        if (self.accuracy is None or self.correct is None) and self.similarity is None:
            raise ValueError("accuracy and correct, or similarity")
        return self


class Estimate(Share):
    """What to expect on images that are not here.

    Attributes:
        on: Which images tell; ``validation`` images flatter, the schedule was chosen with them.
        unmerged: The unmerged model on the same images.
        change: The schedule's share minus that of the unmerged model.
        best_constant: The best constant r on the same images; not for classifiers.
        over_constant: The schedule's share minus that of the best constant r.
    """

    on: Literal["held out", "validation"]
    unmerged: Share
    change: Difference
    best_constant: Share | None = Absent
    over_constant: Difference | None = Absent


class SimilarityEstimate(Mean):
    """What to expect on images that are not here; the unmerged model's similarity is 1.

    Attributes:
        on: Which images tell; ``validation`` images flatter, the schedule was chosen with them.
        images: How many they are.
        lowest: Similarity of the image with the lowest.
        mean_absolute_difference: That of the maps; of maps only.
        best_constant: Mean similarity of the best constant r on the same images.
        over_constant: The schedule's mean minus that of the best constant r.
    """

    on: Literal["held out", "validation"]
    images: Count
    lowest: float
    mean_absolute_difference: float | None = Absent
    best_constant: Mean | None = Absent
    over_constant: Mean | None = Absent


class ChosenSchedule(TunedPoint):
    """The schedule that meets the target.

    Attributes:
        predicted_latency_ms: Milliseconds per batch by the cost table.
    """

    predicted_latency_ms: float | None


class ChosenPoint(ChosenSchedule):
    """The schedule that meets the target, where images are right or wrong.

    Attributes:
        search_accuracy: Share of the search images that are right.
        validation_accuracy: Share of the validation images; None if there are none.
        estimate: What to expect elsewhere; None if the search looked at all images.
    """

    search_accuracy: float
    validation_accuracy: float | None
    estimate: Estimate | None


class ChosenBySimilarity(ChosenSchedule):
    """The schedule that meets the target, where similarity is counted.

    Attributes:
        search_similarity: On the search images.
        validation_similarity: On the validation images; absent if there are none.
        estimate: What to expect elsewhere; None if the search looked at all images.
    """

    search_similarity: Similarity
    validation_similarity: Similarity | None = Absent
    estimate: SimilarityEstimate | None


class UnmergedPoint(Part):
    """The model without merging; its entries mean what those of ``ChosenPoint`` do.

    Those of accuracy are absent where it is compared with itself, without classes.
    """

    macs: Count
    latency_ms: float | None
    predicted_latency_ms: float | None
    accuracy: float | None = Absent
    correct: Count | None = Absent
    search_accuracy: float | None = Absent

    @property
    def counted(self) -> float:
        """As ``TunedPoint.counted``: it is 1 where the unmerged model is what is compared with."""
        return 1.0 if self.accuracy is None else self.accuracy


class GroupCost(Part):
    """Milliseconds of one group of nodes, such as ``attention``.

    Attributes:
        of: The token count that they depend on.
        coefficients: Factors of the count's powers 0, 1, ...
    """

    group: str
    of: Literal["tokens_in", "tokens_out"]
    coefficients: tuple[float, ...]


class LayerCost(Part):
    """The layers of one arithmetic, and what their groups cost."""

    layers: tuple[Count, ...]
    groups: tuple[GroupCost, ...]


class LatencyCosts(Part):
    """What each layer costs; ``tune.latency`` says how it is fitted.

    Attributes:
        outside_ms: Time outside the layers.
        run_over_nodes: Factor from the sum of the nodes to a run.
        residual: Root mean square of the relative error over the measured schedules.
        measurements: How many schedules were measured.
        batch: Images per run.
    """

    unit: Literal["ms"] = "ms"
    outside_ms: float
    run_over_nodes: float
    residual: float
    measurements: Count
    layers: tuple[LayerCost, ...]
    batch: Count
    precision: Precision


class TuneData(Part):
    """The images.

    Attributes:
        source: What the user gave, or ``samples``.
        available: Images that there are.
        search: Images that the search looked at.
        validation: Further images that the choice looked at.
        held_out: Images that only the estimate is of.
    """

    source: Text
    available: Count
    search: Count
    validation: Count
    held_out: Count
    unreadable_count: Count
    notes: tuple[Text, ...]


class SearchInfo(Part):
    """How much was looked at.

    Attributes:
        schedules: Schedules that were measured on the search images.
        min_entropy: Least token-size entropy allowed on any of them; None for any.
        over_merged: Schedules that were measured and have less.
        validation_looks: Schedules that were measured on the validation images in order to choose.
        ended_by_time_limit: Whether the time limit ended the search or the choice.
    """

    schedules: Count
    min_entropy: float | None
    over_merged: Count
    validation_looks: Count
    ended_by_time_limit: bool


class TunedSchedule(ScheduleFile):
    """What ``tune`` writes: a schedule file with the search that found it.

    Attributes:
        objective: What was asked for.
        found: The schedule that was chosen.
        best_constant: The best constant r for the same target; None if none that was found meets
            it.
        front: The schedules worth a look, cheapest first.
        cost_table: Measured costs of the layers; None if latency was not asked for.
        images: How many there were.
        confidence: Level of the intervals.
        seconds: Time that all this took.
    """

    tokens_in: Count
    weights: ScheduleWeights
    reducer: ScheduleReducer
    objective: Objective
    found: ChosenPoint | ChosenBySimilarity
    best_constant: TunedPoint | None
    unmerged: UnmergedPoint
    front: tuple[TunedPoint, ...]
    cost_table: LatencyCosts | None
    images: Count
    data: TuneData
    search: SearchInfo
    confidence: float
    seconds: float
    environment: Environment


def read_search(file: Path) -> TunedSchedule | None:
    """The search that found a schedule; None of a schedule that was written by hand."""
    by_hand = ScheduleFile.read(file)
    return TunedSchedule.read(file) if "front" in (by_hand.model_extra or {}) else None
