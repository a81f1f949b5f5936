"""``tome-export tune``: search a model's per-layer schedule for one target."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from tome_export.artifact.files import check_new_file, keeping, write_whole, writing_to
from tome_export.artifact.goal import Goal, Metric
from tome_export.artifact.schedule import (
    ChosenBySimilarity,
    ChosenPoint,
    Estimate,
    LatencyCosts,
    Objective,
    ScheduleReducer,
    ScheduleWeights,
    SearchInfo,
    Similarity,
    SimilarityEstimate,
    TunedPoint,
    TunedSchedule,
    UnmergedPoint,
)
from tome_export.data.find import SAMPLES
from tome_export.data.labels import Classes
from tome_export.data.metrics import CONFIDENCE, mean_of, paired_difference, share_of
from tome_export.display import scored
from tome_export.errors import InputError, UsageError
from tome_export.merge.entropy import check_min_entropy
from tome_export.merge.schedule import Schedule
from tome_export.progress import Progress, Silent
from tome_export.reducers import DEFAULT
from tome_export.runtime.environment import environment
from tome_export.spec import Activation, ImageSize, Precision
from tome_export.tune.images import TuneImages, read_images, tuning_source
from tome_export.tune.latency import Stopwatch, predicted_ms
from tome_export.tune.measure import (
    ClassMeasure,
    Measure,
    RetrievalMeasure,
    SimilarityMeasure,
)
from tome_export.tune.score import Scorer
from tome_export.tune.search import BASELINES, Finalists, Score, ScoredSchedule, Search, best_of
from tome_export.tune.space import Cost, Rs, rs_of, space_from_model, table_of

if TYPE_CHECKING:
    from tome_export.models import LoadedModel, Recipe
    from tome_export.patch import MergedModel

FREE = 160
"""Free lists that are measured."""

READ_SHARE, COST_SHARE, UNMERGED_SHARE, SEARCH_SHARE, CHOICE_SHARE = 0.15, 0.35, 0.5, 0.75, 0.95
"""Shares of the time limit after which no more images are read, no more schedules timed for the
cost table, the unmerged model is run on no more images, no more is searched, and no finalist is
measured."""

BASELINE_SHARE = 0.5
"""Share of the search's time for the baselines, before the free lists; the rest come behind."""

LATENCY_TRIES = 3
"""Times that a schedule whose real latency is above its target is exchanged for a cheaper one."""

UNTUNABLE = "give a schedule to 'tome-export build' yourself"

SimilarityKind = Literal["similarity", "retrieval"]
"""What is counted of models without classes."""


@dataclass(frozen=True)
class TuneRequest:
    """What to search.

    Attributes:
        model: Recipe name, ``timm:<name>`` or ``module:function``.
        output: The schedule file.
        data: A folder or shards of images; ``samples`` for those that come along.
        labels: File of labels for a folder of images.
        classes_in_order: Whether class folders are in the order of the model's classes.
        limit: Most images; None for as many as a search in minutes can take.
        weights: ``pretrained``, ``random`` or the path of a checkpoint.
        weights_key: Where in that file they are; see ``weights.files.read_checkpoint``.
        activation: What makes scores of the output; None for what the model says.
        image_size: Size of the images; None for the model's own.
        measure: What is counted of a model without classes; None for similarity.
        batch: Images per run, for latency.
        precision: Precision whose latency is measured; outputs are compared in fp32.
        time_limit: Seconds, from when the model is loaded, after which the best by then is taken.
            What is begun then is finished.
        seed: Seed of the images drawn, the search, and random weights.
        reducer_options: Options of the reducer, each ``key=value``.
        min_entropy: Least token-size entropy (``merge.entropy``) of any search image; schedules
            with less are not considered. None for any.
    """

    model: str
    goal: Goal
    output: Path
    data: tuple[str, ...] = (SAMPLES,)
    labels: Path | None = None
    classes_in_order: bool = False
    limit: int | None = None
    weights: str = "pretrained"
    weights_key: str = ""
    activation: Activation | None = None
    image_size: ImageSize | None = None
    measure: SimilarityKind | None = None
    batch: int = 1
    precision: Precision = "fp32"
    time_limit: float = 600.0
    seed: int = 0
    force: bool = False
    reducer: str = DEFAULT
    reducer_options: tuple[str, ...] = ()
    min_entropy: float | None = None


def tune(request: TuneRequest, progress: Progress | None = None) -> TunedSchedule:
    """Search a schedule and write it to a file; nothing is written if none meets the target.

    Raises:
        InputError: if model, weights, data or output are not usable, or no schedule that merges
            anything meets the target; the message says what can be reached.
        UnrecordedError: if the file cannot be written any more; it holds what was found.
        UsageError: if a number is out of range, or target or measure are not for such a model.
        MissingComponentError: if latency is asked for and onnxruntime is not here.
    """
    began = time.monotonic()
    progress = progress or Silent()
    _check_numbers(request)
    check_new_file(request.output, force=request.force)
    progress.stage(f"Load {request.model}")
    subject = _load(request)
    loaded, model = subject.loaded, subject.model
    progress.detail(f"weights: {loaded.weights.kind}, {loaded.weights.source}")
    progress.stage("Read images")
    ready = time.monotonic()

    def until(share: float) -> float:
        return ready + share * request.time_limit

    preprocessing = replace(loaded.recipe.preprocessing, input_size=model.image_size)
    recipe = replace(loaded.recipe, preprocessing=preprocessing)
    images = read_images(
        tuning_source(recipe, subject.classes, request.data, request.labels),
        preprocessing,
        model.macs(merged=False),
        request.limit,
        request.seed,
        progress,
        until(READ_SHARE),
        subject.output_bytes,
        graded=subject.classes is None and request.measure != "retrieval",
    )
    measure = subject.measure(request.measure, images)
    tuning = _Tuning(request, loaded, model, images, measure, progress, until)
    progress.stage(f"Measure the unmerged model on {len(images.pixels)} images")
    targeted = not request.goal.bounds_cost
    with Scorer(
        subject.compared, images, measure, until(UNMERGED_SHARE), targeted=targeted
    ) as scorer:
        found = tuning.searched(scorer, began)
    with keeping(found):
        check_new_file(request.output, force=request.force)
        with writing_to(request.output, "file"):
            write_whole(request.output, found.json_bytes())
    return found


def _check_numbers(request: TuneRequest) -> None:
    if request.batch < 1:
        raise UsageError(f"--batch is {request.batch}; expected at least 1 image per run")
    if not request.time_limit > 0:
        raise UsageError(f"--time-limit is {request.time_limit:g}; expected seconds above 0")
    if request.seed < 0:
        raise UsageError(f"--seed is {request.seed}; expected 0 or more")
    if request.limit is not None and request.limit < 1:
        raise UsageError(f"--limit is {request.limit}; expected at least 1 image")
    check_min_entropy(request.min_entropy)


@dataclass(frozen=True)
class _Subject:
    """What is tuned.

    Attributes:
        model: What costs are of.
        compared: What outputs are of: the model itself, or of one that gives a sequence of tokens,
            whose number merging changes, the same with the features of every patch.
        activation: Activation of a classifier; None for models without classes.
        classes: Those of a classifier; None for models without classes.
        output_bytes: What is kept of outputs for each image of a model without classes.
        maps: Whether outputs are maps.
    """

    loaded: LoadedModel
    model: MergedModel
    compared: MergedModel
    activation: Activation | None = None
    classes: Classes | None = None
    output_bytes: int = 0
    maps: bool = False

    def measure(self, kind: SimilarityKind | None, images: TuneImages) -> Measure:
        """What is counted of the images."""
        if self.activation is not None:
            return ClassMeasure(self.activation, images.labels)
        return RetrievalMeasure() if kind == "retrieval" else SimilarityMeasure(self.maps)


def _load(request: TuneRequest) -> _Subject:
    from tome_export.models import resolve
    from tome_export.patch import patch
    from tome_export.patch.describe import check_memory, output_shape
    from tome_export.reducers import reducer_from_text

    reducer = reducer_from_text(request.reducer, request.reducer_options)
    if request.min_entropy is not None and not reducer.counts_patches:
        raise InputError(
            f"reducer {reducer.name} weighs the size of a token by similarity, so --min-entropy "
            "cannot count its patches; leave --min-entropy out"
        )
    recipe = resolve(request.model, image_size=request.image_size)
    if request.weights in ("pretrained", "random"):  # a file may bring a classifier of its own
        _check_goal(recipe.scored_by(request.activation), request)
    loaded = recipe.load(
        request.weights,
        request.seed,
        weights_key=request.weights_key,
        reducer_keys=reducer.own_keys,
    )
    loaded = replace(loaded, recipe=loaded.recipe.scored_by(request.activation))
    _check_goal(loaded.recipe, request)
    dense = loaded.recipe.output.dense_only
    prop_attn = reducer.proportional(recipe.merging.prop_attn)
    # Without an r first: what a reducer has learned need not be there for one that is refused.
    plain = patch(loaded.module, 0, prop_attn=prop_attn, reducer=reducer, dense=dense)
    layers = reducer.layers(Schedule(1), plain.tower)
    able = [index for index, layer in enumerate(layers) if layer.r]
    if any(not layer.r and reducer.limit(layer.tokens_in, plain.prefix) for layer in layers):
        raise InputError(
            f"reducer {reducer.name} removes tokens in layers {','.join(map(str, able))} only; "
            "tune gives every layer an r of its own, use another reducer"
        )

    def patched(dense: bool) -> MergedModel:
        # Schedules are given to each pass.
        return patch(
            loaded.module,
            1,
            prop_attn=prop_attn,
            reducer=reducer,
            learned=loaded.learned,
            dense=dense,
        ).eval()

    model = patched(dense)
    check_memory(model, request.batch)
    if model.extra_inputs:
        raise InputError(
            f"reducer {reducer.name} needs the input {', '.join(model.extra_inputs)}, which images "
            "to tune on do not have; use another reducer"
        )
    recipe = loaded.recipe
    if recipe.output.kind != "classes":
        compared, maps = model, recipe.output.kind == "map"
        if not maps and not dense and len(output_shape(model)) > 1:
            if reducer.drops:
                raise InputError(
                    f"{recipe.name} gives a sequence of tokens, which is compared patch by patch, "
                    f"and reducer {reducer.name} drops patches; use a reducer that merges, such as "
                    "tome"
                )
            compared = patched(True)
        shape = output_shape(compared)
        if len(shape) > 1 and request.measure == "retrieval":
            raise UsageError(
                f"--measure retrieval compares one vector of features per image, and {recipe.name} "
                f"gives {list(shape)}; leave --measure out"
            )
        if request.measure == "retrieval" and request.data == (SAMPLES,):
            raise UsageError(
                "--measure retrieval looks for nearest neighbours, and the samples are six "
                "photographs and their mirror images; give images of yours with --data"
            )
        # Those of the unmerged model, and beside them those of a schedule.
        kept = 2 * 4 * math.prod(shape)
        return _Subject(loaded, model, compared, output_bytes=kept, maps=maps)
    shape = output_shape(model)
    activation = recipe.activation(shape)
    if activation == "none":
        raise InputError(
            f"{recipe.name} gives numbers (a regression), not classes to count; {UNTUNABLE}"
        )
    classes = Classes.of_outputs(shape[-1], recipe.output.label_names(shape[-1]))
    classes = replace(classes, in_order=request.classes_in_order)
    return _Subject(loaded, model, model, activation, classes)


def _check_goal(recipe: Recipe, request: TuneRequest) -> None:
    """Refuse a target or measure that is not for what the model gives."""
    name, kind, goal = recipe.name, recipe.output.kind, request.goal.kind
    if recipe.video is not None:
        raise InputError(f"{name} takes videos, and schedules are tuned on images; {UNTUNABLE}")
    if kind == "classes":
        if request.measure is not None:
            raise UsageError(
                f"{name} gives classes, of which the right ones are counted; leave --measure "
                f"{request.measure} out, which is for models of features or maps"
            )
        if goal == "min-similarity":
            raise UsageError(
                f"{name} gives classes, which are right or wrong and not similar; give "
                "--min-accuracy, such as -0.5, in place of --min-similarity"
            )
        return
    if goal == "min-accuracy":
        what = "a map, which is" if kind == "map" else "features, which are"
        raise UsageError(
            f"{name} gives {what} neither right nor wrong; give --min-similarity, such "
            "as 0.98, in place of --min-accuracy"
        )
    if kind == "map" and request.measure == "retrieval":
        raise UsageError(
            f"--measure retrieval compares one vector of features per image, and {name} gives a "
            "map; leave --measure out"
        )


class _Tuning:
    """One search within its time; what schedules cost is known before images are classified."""

    def __init__(
        self,
        request: TuneRequest,
        loaded: LoadedModel,
        model: MergedModel,
        images: TuneImages,
        measure: Measure,
        progress: Progress,
        until: Callable[[float], float],
    ) -> None:
        self.metric = measure.metric
        self.request, self.goal, self.progress = request, request.goal, progress
        self.loaded, self.model, self.images, self.until = loaded, model, images, until
        self.space = space_from_model(model)
        self.unmerged: Rs = (0,) * self.space.depth
        self.cost: Cost = self.space.macs
        self.stopwatch: Stopwatch | None = None
        self.table: LatencyCosts | None = None
        if self.goal.kind == "target-latency-ms":
            progress.stage("Measure the cost of each layer")
            batch = np.resize(images.pixels, (request.batch, *images.pixels.shape[1:]))
            self.stopwatch = Stopwatch(model, batch, request.precision, loaded.recipe.output.name)
            self.table = self.stopwatch.costs(
                self.space, progress, self.goal.value, until(COST_SHARE)
            )
            self.cost = partial(predicted_ms, self.space, self.table)
        self.budget = self._checked_budget()
        self.cut_short = False

    def _checked_budget(self) -> float | None:
        schedules = table_of([self.unmerged, self._least_cost()])
        unmerged, least = map(float, self.cost(schedules))
        budget = self.goal.budget(unmerged)
        if budget is None or budget >= least:
            return budget
        if self.table is not None:
            raise InputError(
                f"target is {self.target}; the fastest schedule by the cost table takes "
                f"{least:.3g} ms and the unmerged model {unmerged:.3g} ms, ask for no less"
            )
        raise InputError(
            f"target is {self.target}; merging all that can be in every layer still takes "
            f"{least / 1e6:.2f} M of the unmerged model's {unmerged / 1e6:.2f} M, ask for no less"
        )

    def _least_cost(self) -> Rs:
        """The schedule that costs least: of MACs surely, of milliseconds among those to start from.

        In MACs it is the one that merges most. In time, merging itself may cost more than it saves.
        """
        found = [self.space.most_merged()]
        if self.table is not None:
            found += [r for method in BASELINES for r in self.space.baselines(method)]
            found += [r for row in self.space.neighbours(self.unmerged) if any(r := rs_of(row))]
        return found[int(self.cost(table_of(found)).argmin())]

    def _macs(self, r: Rs) -> int:
        return int(self.space.macs(table_of([r]))[0])

    def _predicted_ms(self, r: Rs) -> float | None:
        return None if self.table is None else float(self.cost(table_of([r]))[0])

    def searched(self, scorer: Scorer, began: float) -> TunedSchedule:
        """Search and choose: the content of the schedule file, of a command begun at ``began``."""
        from tome_export.patch.describe import state_sha256

        self.images = scorer.images
        self.plain = scorer.unmerged[: self.images.chosen_on]
        self.needed = self.goal.needed(len(self.plain), self.plain.sum().item()) or 0
        if self.needed > self.plain.sum():
            raise InputError(
                f"target is {self.target}; the unmerged model itself has "
                f"{self._scored(self.plain.mean())}, ask for no more"
            )
        self.search = self._search(scorer)
        validate = scorer.validation if self.images.data.validation else None
        self.finalists = Finalists(validate, self._late)
        chosen, latency_ms, unmerged_ms = self._choose()
        looks = len(self.finalists.measured) if validate else 0
        ended = self.search.cut_short or self.cut_short
        constant = self._pick(self._points("constant"), self.budget)
        self.progress.stage("Measure the front")
        front = self.finalists.front(self._points())

        def entry(point: ScoredSchedule) -> TunedPoint:
            return TunedPoint(
                schedule=point.r,
                method=point.method,
                macs=self._macs(point.r),
                latency_ms=self._predicted_ms(point.r),
                **self._counted(point.score),
                damage=point.score.damage,
                entropy=point.score.entropy,
                chosen=point.r == chosen.r,
            )

        weights, data = self.loaded.weights, self.images.data
        searched = self.search.points[chosen.r].score
        plain = self.plain if self.metric in ("top1", "agreement") else None
        return TunedSchedule(
            format=1,
            model=self.loaded.recipe.name,
            schedule=chosen.r,
            tokens_in=self.space.tokens,
            image_size=str(ImageSize(*self.model.image_size[1:])),
            weights=ScheduleWeights(
                kind=weights.kind, source=weights.source, state_sha256=state_sha256(self.model)
            ),
            reducer=ScheduleReducer(**self.model.settings.reducer.record()),
            objective=Objective(**vars(self.goal), metric=self.metric, text=self.target),
            found=self._found(
                {**vars(entry(chosen)), "latency_ms": latency_ms},
                searched,
                scorer.counted(chosen.r, data.search, scorer.images.chosen_on)[0]
                if validate
                else None,
                estimate(chosen.r, constant.r if constant else None, scorer, self.metric),
            ),
            best_constant=entry(constant) if constant else None,
            unmerged=UnmergedPoint(
                macs=self._macs(self.unmerged),
                latency_ms=unmerged_ms,
                predicted_latency_ms=self._predicted_ms(self.unmerged),
                accuracy=None if plain is None else float(plain.mean()),
                correct=None if plain is None else int(plain.sum()),
                search_accuracy=None if plain is None else float(plain[: data.search].mean()),
            ),
            front=tuple(map(entry, front)),
            cost_table=self.table,
            images=len(self.images.pixels),
            data=data,
            search=SearchInfo(
                schedules=len(self.search.points),
                min_entropy=self.request.min_entropy,
                over_merged=self._over_merged,
                validation_looks=looks,
                ended_by_time_limit=ended,
            ),
            confidence=CONFIDENCE,
            seconds=time.monotonic() - began,
            environment=environment(),
        )

    @property
    def target(self) -> str:
        """The target in words."""
        if self.metric == "retrieval" and self.goal.kind == "min-similarity":
            share = f"{100 * self.goal.value:g} %"
            return f"the nearest neighbour kept for at least {share} of the images"
        return str(self.goal)

    def _scored(self, value: float) -> str:
        return scored(float(value), self.metric, 2)

    def _counted(self, score: Score) -> dict[str, Any]:
        """What a score has of the entries of a ``TunedPoint``."""
        found: dict[str, Any] = {}
        if self.metric != "similarity":
            found = {"accuracy": score.total / score.images, "correct": int(score.total)}
        if self.metric in ("similarity", "retrieval"):
            found["similarity"] = similarity_of(score)
        return found

    def _found(
        self,
        entry: dict[str, Any],
        searched: Score,
        validated: Score | None,
        expected: Estimate | SimilarityEstimate | None,
    ) -> ChosenPoint | ChosenBySimilarity:
        entry["predicted_latency_ms"] = self._predicted_ms(entry["schedule"])
        entry["estimate"] = expected
        if self.metric == "similarity":
            return ChosenBySimilarity(
                **entry,
                search_similarity=similarity_of(searched),
                validation_similarity=None if validated is None else similarity_of(validated),
            )
        return ChosenPoint(
            **entry,
            search_accuracy=searched.total / searched.images,
            validation_accuracy=None if validated is None else validated.total / validated.images,
        )

    def _search(self, scorer: Scorer) -> Search:
        count = self.images.data.search
        search = Search(
            self.space,
            self.cost,
            scorer.search,
            budget=self.budget,
            needed=self.goal.needed(count, self.plain[:count].sum().item()),
            seed=self.request.seed,
            min_entropy=self.request.min_entropy or 0.0,
            deadline=self.until(SEARCH_SHARE),
            on_progress=self.progress.step,
        )
        self.progress.stage(f"Search on {count} images")
        search.measure(self.unmerged, "constant")
        # However little time there is, this meets a budget: the best constant r, if one does.
        search.measure(search.dearest("constant") or self._least_cost(), "constant")
        search.baselines(BASELINE_SHARE)
        search.free(FREE)
        search.baselines()
        return search

    def _late(self) -> bool:
        self.cut_short = time.monotonic() > self.until(CHOICE_SHARE)
        return self.cut_short

    def _points(self, method: str = "") -> list[ScoredSchedule]:
        points = [point for point in self.search.considered() if any(point.r)]
        return [point for point in points if method in ("", point.method)]

    @property
    def _over_merged(self) -> int:
        """Schedules that were measured, and merge more than is allowed."""
        return len(self.search.points) - len(self.search.considered())

    def _pick(self, points: list[ScoredSchedule], budget: float | None) -> ScoredSchedule | None:
        if budget is not None:
            return self.finalists.best_within(points, budget)
        return self.finalists.cheapest(points, self.needed, self.images.data.validation)

    def _choose(self) -> tuple[ScoredSchedule, float | None, float | None]:
        """The schedule that meets the target; measured latencies of it and the unmerged model.

        It is run for real; where it is too slow, a cheaper one is chosen.
        """
        self.progress.stage(f"Compare finalists on {self.images.chosen_on} images")
        found = self._pick(self._points(), self.budget)
        if found is None:
            raise InputError(
                f"no schedule was found for the target, {self.target}; {self._reachable()}"
            )
        if self.stopwatch is None:
            return found, None, None
        target = budget = self.goal.value
        least, unmerged = float("inf"), 0.0
        for _ in range(LATENCY_TRIES):
            self.progress.stage("Run the chosen schedule")
            latency, unmerged = self.stopwatch.runs_ms([found.r, self.unmerged])
            if latency <= target:
                return found, latency, unmerged
            least = min(least, latency)
            budget = min(budget, found.cost) * target / latency * 0.99
            cheaper = None if self._late() else self._pick(self._points(), budget)
            if cheaper is None:
                break
            found = cheaper
        raise InputError(
            f"target is {self.target}; the fastest schedule that was run takes {least:.3g} ms, "
            f"unmerged {unmerged:.3g} ms: ask for more time, or less load on this machine"
        )

    def _reachable(self) -> str:
        """The best there is, for a target that nothing meets."""
        late = ""
        if self.search.cut_short or self.cut_short:
            late = f"the time limit of {self.request.time_limit:g} s was reached, "
        if self._over_merged:
            least = self.request.min_entropy or 0.0
            late += f"{self._over_merged} schedules fall under --min-entropy {least:g}, "
        points = [point for point in self._points() if point.score.complete]
        if not points:
            return f"{late}none was measured whole; give more with --time-limit"
        best = self.finalists.measure(best_of(points))
        return (
            f"{late}the best that was found has "
            f"{self._scored(best.score.total / best.score.images)} "
            f"(unmerged {self._scored(self.plain.mean())}): {','.join(map(str, best.r))}"
        )


def similarity_of(score: Score) -> Similarity:
    """The similarity of outputs without classes, of which the damage is what it lacks of 1."""
    return Similarity(
        mean=1 - score.damage,
        lowest=1 - score.worst,
        mean_absolute_difference=score.difference,
    )


def estimate(
    r: Rs, constant: Rs | None, scorer: Scorer, metric: Metric
) -> Estimate | SimilarityEstimate | None:
    """What to expect on images that are not here, with its interval.

    It comes from the held-out images alone. Where there are none it comes from the validation
    images, which the schedule was chosen with: then it is optimistic. Where there are none of those
    either, nothing can be said: the search picked what is right on its own images.

    For models without classes ``constant``, the best constant r, is measured on the same images.
    """
    images, whole = scorer.images, len(scorer.unmerged)
    held_out = images.chosen_on < whole
    first, last = (images.chosen_on, whole) if held_out else (images.data.search, images.chosen_on)
    on: Literal["held out", "validation"] = "held out" if held_out else "validation"
    if last - first < (2 if metric == "similarity" else 1):
        return None
    score, each = scorer.counted(r, first, last)
    other: NDArray[Any] | None = None
    if constant is not None and metric in ("similarity", "retrieval"):
        other = scorer.counted(constant, first, last)[1]
    if metric == "similarity":
        return SimilarityEstimate(
            **vars(mean_of(each)),
            on=on,
            images=last - first,
            lowest=1 - score.worst,
            mean_absolute_difference=score.difference,
            best_constant=None if other is None else mean_of(other),
            over_constant=None if other is None else mean_of(each - other),
        )
    unmerged = scorer.unmerged[first:last].astype(bool)
    return Estimate(
        **vars(share_of(each)),
        on=on,
        unmerged=share_of(unmerged),
        change=paired_difference(each, unmerged),
        best_constant=None if other is None else share_of(other),
        over_constant=None if other is None else paired_difference(each, other),
    )
