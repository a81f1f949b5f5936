"""``tome-export tune``: search a model's per-layer schedule for one target."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from tome_export.artifact.files import check_new_file, keeping, write_whole, writing_to
from tome_export.artifact.goal import Goal
from tome_export.artifact.schedule import (
    ChosenPoint,
    Estimate,
    Objective,
    ScheduleReducer,
    ScheduleWeights,
    SearchInfo,
    TuneData,
    TunedPoint,
    TunedSchedule,
    UnmergedPoint,
)
from tome_export.data.find import SAMPLES
from tome_export.data.labels import Classes
from tome_export.data.metrics import CONFIDENCE, paired_difference, share_of
from tome_export.errors import InputError, UsageError
from tome_export.merge.entropy import check_min_entropy
from tome_export.merge.schedule import Schedule
from tome_export.models.activation import activation_of
from tome_export.patch.describe import output_shape, state_sha256
from tome_export.progress import Progress, Silent
from tome_export.reducers import DEFAULT
from tome_export.spec import Activation, Precision
from tome_export.tune.choose import Finalist, Finalists
from tome_export.tune.images import TuneImages, sized, tune_images
from tome_export.tune.latency import Stopwatch
from tome_export.tune.score import Scorer, space_of
from tome_export.tune.search import BASELINES, ScoredSchedule, Search
from tome_export.tune.space import Cost, Rs, rs_of, table_of
from tome_export.tune.table import CostTable

if TYPE_CHECKING:
    from tome_export.models import LoadedModel, Recipe
    from tome_export.patch import MergedModel

FREE = 160
"""Free lists that are measured."""

READ_SHARE, COST_SHARE, UNMERGED_SHARE, SEARCH_SHARE, CHOICE_SHARE = 0.15, 0.35, 0.5, 0.75, 0.95
"""Shares of the time limit after which no more images are read, no more schedules timed for the
cost table, the unmerged model is run on no more images, no more is searched, and no finalist is
measured."""

LATENCY_TRIES = 3
"""Times that a schedule whose real latency is above its target is exchanged for a cheaper one."""


@dataclass(frozen=True)
class TuneRequest:
    """What to search.

    Attributes:
        model: Recipe name, ``timm:<name>`` or ``module:function``.
        goal: The target.
        output: The schedule file.
        data: A folder or shards of images; ``samples`` for those that come along.
        labels: File of labels for a folder of images.
        classes_in_order: As of ``data.labels.Classes``.
        limit: Most images; None for as many as a search in minutes can take.
        weights: ``pretrained``, ``random`` or the path of a checkpoint.
        weights_key: Where in that file they are; see ``weights.files.read_checkpoint``.
        activation: What makes scores of the output; None for what the model says.
        batch: Images per run, for latency.
        precision: Of the model whose latency is measured; classes are counted in fp32.
        time_limit: Seconds, from when the model is loaded, after which the best by then is taken.
            What is begun then is finished.
        seed: Of the images drawn, their split, the search, and of random weights.
        force: Replace an existing file.
        reducer: Name of the reducer.
        reducer_options: Its options, each ``key=value``.
        min_entropy: Least token-size entropy of any search image (``merge.entropy``); schedules
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
        UsageError: if a number is out of range.
        MissingComponentError: if latency is asked for and onnxruntime is not here.
    """
    start = time.monotonic()
    progress = progress or Silent()
    _check_numbers(request)
    check_new_file(request.output, force=request.force)
    progress.stage(f"Load {request.model}")
    loaded, model = _load(request)
    progress.detail(f"weights: {loaded.weights.kind}, {loaded.weights.source}")
    shape = output_shape(model)
    activation = activation_of(loaded.recipe, shape)
    if activation == "none":
        raise InputError(
            f"{loaded.recipe.name} gives numbers (a regression), not classes to count; tune a "
            "classifier, or give a schedule to 'tome-export build' yourself"
        )
    classes = Classes.of_outputs(shape[-1], loaded.recipe.label_names(shape[-1]))
    progress.stage("Read images")
    ready = time.monotonic()
    images = tune_images(
        sized(loaded.recipe, model.image_size),
        model.macs(merged=False),
        replace(classes, in_order=request.classes_in_order),
        request.data,
        request.labels,
        request.limit,
        request.seed,
        progress,
        ready + READ_SHARE * request.time_limit,
    )
    costs = _Costs(request, loaded, model, images, ready, progress)
    progress.stage(f"Measure the unmerged model on {len(images.pixels)} images")
    with Scorer(model, images, activation, ready + UNMERGED_SHARE * request.time_limit) as scorer:
        images = _judged(scorer.images, scorer, request.goal)
        tuning = _Tuning(request, loaded, model, images, scorer, costs, ready, progress)
        found = tuning.result(start)
    with keeping(found):
        check_new_file(request.output, force=request.force)
        with writing_to(request.output, "file"):
            write_whole(request.output, found.json_bytes())
    return found


def _judged(images: TuneImages, scorer: Scorer, goal: Goal) -> TuneImages:
    """The images with a note where agreement on them tells little.

    Raises:
        InputError: if it is what a target asks for.
    """
    if not scorer.one_answer:
        return images
    what = (
        f"the unmerged model says the same of all {len(images.pixels)} images, so agreement with "
        "it tells no schedule from another"
    )
    fix = "give images with labels (class sub-folders), or more different ones, with --data"
    if goal.kind == "min-accuracy":
        raise InputError(f"{what}; {fix}")
    return replace(images, notes=(*images.notes, f"{what}: schedules are told apart by damage"))


def _require_classes(recipe: Recipe) -> None:
    if recipe.output_name != "logits":
        raise InputError(
            f"{recipe.name} gives {recipe.output_name}, not classes to count; tune a classifier, "
            "or give a schedule to 'tome-export build' yourself"
        )


def _check_numbers(request: TuneRequest) -> None:
    if request.batch < 1:
        raise UsageError(f"--batch is {request.batch}; expected at least 1 image per run")
    if not request.time_limit > 0:
        raise UsageError(f"--time-limit is {request.time_limit:g}; expected seconds above 0")
    if request.seed < 0:
        raise UsageError(f"--seed is {request.seed}; expected 0 or more")
    check_min_entropy(request.min_entropy)


def _load(request: TuneRequest) -> tuple[LoadedModel, MergedModel]:
    from tome_export.models import resolve
    from tome_export.patch import patch
    from tome_export.reducers import reducer_from_text

    reducer = reducer_from_text(request.reducer, request.reducer_options)
    if request.min_entropy is not None and not reducer.counts_patches:
        raise InputError(
            f"reducer {reducer.name} weighs the size of a token by similarity, so --min-entropy "
            "cannot count its patches; leave --min-entropy out"
        )
    recipe = replace(
        resolve(request.model), reducer_keys=reducer.own_keys, weights_key=request.weights_key
    )
    if request.weights in ("pretrained", "random"):  # a file may bring a classifier of its own
        _require_classes(recipe.scored_by(request.activation))
    loaded = recipe.load(weights=request.weights, seed=request.seed)
    loaded = replace(loaded, recipe=loaded.recipe.scored_by(request.activation))
    _require_classes(loaded.recipe)
    prop_attn = reducer.proportional(recipe.prop_attn)
    # Without an r first: what a reducer has learned need not be there for one that is refused.
    plain = patch(loaded.module, 0, prop_attn=prop_attn, reducer=reducer)
    layers = reducer.layers(Schedule(1), plain.tower)
    able = [index for index, layer in enumerate(layers) if layer.r]
    if any(not layer.r and reducer.limit(layer.tokens_in, plain.prefix) for layer in layers):
        raise InputError(
            f"reducer {reducer.name} removes tokens in layers {','.join(map(str, able))} only; "
            "tune gives every layer an r of its own, use another reducer"
        )
    # Schedules are given to each pass.
    model = patch(
        loaded.module, 1, prop_attn=prop_attn, reducer=reducer, learned=loaded.learned
    ).eval()
    if model.extra_inputs:
        raise InputError(
            f"reducer {reducer.name} needs the input {', '.join(model.extra_inputs)}, which images "
            "to tune on do not have; use another reducer"
        )
    return loaded, model


class _Costs:
    """What schedules cost, and how much they may: known before any image is classified.

    Attributes:
        space: All schedules.
        stopwatch: Times schedules, where the target is a latency.
        table: What they take by it.
        cost: MACs, or milliseconds by the table.
        budget: Most cost; None if an accuracy is the target.

    Raises:
        InputError: if nothing can meet the target.
        MissingComponentError: if latency is asked for and onnxruntime is not here.
    """

    def __init__(
        self,
        request: TuneRequest,
        loaded: LoadedModel,
        model: MergedModel,
        images: TuneImages,
        ready: float,
        progress: Progress,
    ) -> None:
        goal = request.goal
        self.space = space_of(model)
        self.unmerged: Rs = (0,) * self.space.depth
        self.stopwatch: Stopwatch | None = None
        self.table: CostTable | None = None
        self.cost: Cost = self.space.macs
        if goal.kind == "target-latency-ms":
            progress.stage("Measure the cost of each layer")
            pixels = images.pixels[: request.batch]
            self.stopwatch = Stopwatch(
                model, pixels, request.batch, request.precision, loaded.recipe.output_name
            )
            until = ready + COST_SHARE * request.time_limit
            self.table = self.stopwatch.table(self.space, progress, goal.value, until)
            self.cost = self.table.latency_ms
        self.budget = self._checked_budget(goal)

    def cheapest(self) -> Rs:
        """The schedule that costs least: of MACs surely, of milliseconds among those to start from.

        In MACs it is the one that merges most. In time, merging itself may cost more than it saves.
        """
        found = [self.space.most_merged()]
        if self.table is not None:
            found += [r for method in BASELINES for r in self.space.baselines(method)]
            found += [r for row in self.space.neighbours(self.unmerged) if any(r := rs_of(row))]
        return found[int(self.cost(table_of(found)).argmin())]

    def _checked_budget(self, goal: Goal) -> float | None:
        unmerged, least = map(float, self.cost(table_of([self.unmerged, self.cheapest()])))
        budget = goal.budget(unmerged)
        if budget is None or budget >= least:
            return budget
        if self.table is not None:
            raise InputError(
                f"target is {goal}; the fastest schedule by the cost table takes "
                f"{least:.3g} ms and the unmerged model {unmerged:.3g} ms, ask for no less"
            )
        raise InputError(
            f"target is {goal}; merging all that can be in every layer still takes "
            f"{least / 1e6:.2f} M of the unmerged model's {unmerged / 1e6:.2f} M, ask for no less"
        )


class _Tuning:
    """One search, from the scored images to the result, within its time.

    Raises:
        InputError: if nothing can meet the target.
    """

    def __init__(
        self,
        request: TuneRequest,
        loaded: LoadedModel,
        model: MergedModel,
        images: TuneImages,
        scorer: Scorer,
        costs: _Costs,
        ready: float,
        progress: Progress,
    ) -> None:
        self._request, self._goal, self._progress = request, request.goal, progress
        self._loaded, self._model = loaded, model
        self._images, self._scorer = images, scorer
        self._space, self._unmerged, self._table = costs.space, costs.unmerged, costs.table
        self._costs, self._budget = costs, costs.budget
        self._right = scorer.unmerged_right[: images.chosen_on]
        self._needed = self._goal.needed(len(self._right), int(self._right.sum())) or 0
        if self._goal.kind == "min-accuracy" and self._needed > self._right.sum():
            raise InputError(
                f"target is {self._goal}; the unmerged model itself has "
                f"{100 * self._right.mean():.2f} %, ask for no more"
            )
        self._start = ready
        self._cut_short = False
        self._search = self._searched()
        validates = images.chosen_on > images.search
        self._finalists = Finalists(scorer.validation if validates else None, self._late)

    def result(self, start: float) -> TunedSchedule:
        """The content of the schedule file.

        Args:
            start: When the command began, in seconds of ``time.monotonic``.

        Raises:
            InputError: if no schedule was found in time that meets the target; it says what can be
                reached.
        """
        from tome_export.runtime.environment import environment

        images, request, weights = self._images, self._request, self._loaded.weights
        chosen, latency_ms, unmerged_ms = self._choose()
        looks, ended = len(self._finalists.measured), self._search.cut_short or self._cut_short
        constant = self._pick(self._points("constant"), self._budget)
        self._progress.stage("Measure the front")
        front = self._finalists.front(self._points())
        score, validation, right = chosen.point.score, chosen.validation, self._right
        points = list(self._search.points.values())

        def entry(finalist: Finalist) -> TunedPoint:
            point = finalist.point
            return TunedPoint(
                schedule=point.r,
                method=point.method,
                macs=self._macs(point.r),
                latency_ms=self._predicted_ms(point.r),
                accuracy=finalist.correct / finalist.images,
                correct=finalist.correct,
                damage=finalist.damage,
                entropy=point.score.entropy,
                chosen=point.r == chosen.point.r,
            )

        found = ChosenPoint(
            **{**vars(entry(chosen)), "latency_ms": latency_ms},
            predicted_latency_ms=self._predicted_ms(chosen.point.r),
            search_accuracy=score.correct / score.images,
            validation_accuracy=validation and validation.correct / validation.images,
            estimate=estimate(chosen.point.r, images, self._scorer),
        )
        return TunedSchedule(
            format=1,
            model=self._loaded.recipe.name,
            schedule=chosen.point.r,
            tokens_in=self._space.tokens,
            weights=ScheduleWeights(
                kind=weights.kind, source=weights.source, state_sha256=state_sha256(self._model)
            ),
            reducer=ScheduleReducer(**self._model.settings.reducer.record()),
            objective=Objective(
                kind=self._goal.kind,
                value=self._goal.value,
                relative=self._goal.relative,
                metric=images.metric,
                text=str(self._goal),
            ),
            found=found,
            best_constant=entry(constant) if constant else None,
            unmerged=UnmergedPoint(
                macs=self._macs(self._unmerged),
                latency_ms=unmerged_ms,
                predicted_latency_ms=self._predicted_ms(self._unmerged),
                accuracy=float(right.mean()),
                correct=int(right.sum()),
                search_accuracy=float(right[: images.search].mean()),
            ),
            front=tuple(map(entry, front)),
            cost_table=self._table and self._table.costs,
            images=len(images.pixels),
            data=TuneData(
                source=images.source,
                available=images.available,
                search=images.search,
                validation=images.chosen_on - images.search,
                held_out=len(images.pixels) - images.chosen_on,
                unreadable_count=images.unreadable,
                notes=images.notes,
            ),
            search=SearchInfo(
                schedules=len(points),
                min_entropy=request.min_entropy,
                over_merged=self._over_merged,
                validation_looks=looks if validation else 0,
                ended_by_time_limit=ended,
            ),
            confidence=CONFIDENCE,
            seconds=time.monotonic() - start,
            environment=environment(),
        )

    def _macs(self, r: Rs) -> int:
        return int(self._space.macs(table_of([r]))[0])

    def _predicted_ms(self, r: Rs) -> float | None:
        return None if self._table is None else float(self._table.latency_ms(table_of([r]))[0])

    def _late(self) -> bool:
        limit = CHOICE_SHARE * self._request.time_limit
        self._cut_short = time.monotonic() - self._start > limit
        return self._cut_short

    def _searched(self) -> Search:
        count = self._images.search
        search = Search(
            self._space,
            self._costs.cost,
            self._scorer.search,
            budget=self._budget,
            needed=self._goal.needed(count, int(self._right[:count].sum())),
            seed=self._request.seed,
            min_entropy=self._request.min_entropy or 0.0,
            deadline=self._start + SEARCH_SHARE * self._request.time_limit,
            on_progress=self._progress.step,
        )
        self._progress.stage(f"Search on {count} images")
        search.measure(self._unmerged, "constant")
        # The other end, so that a budget is met however little time there is.
        search.measure(self._costs.cheapest(), "constant")
        search.baselines()
        search.free(FREE)
        return search

    def _points(self, method: str = "") -> list[ScoredSchedule]:
        points = [point for point in self._search.considered() if any(point.r)]
        return [point for point in points if method in ("", point.method)]

    @property
    def _over_merged(self) -> int:
        """Schedules that were measured, and merge more than is allowed."""
        return len(self._search.points) - len(self._search.considered())

    def _choose(self) -> tuple[Finalist, float | None, float | None]:
        """The schedule that meets the target; measured latencies of it and the unmerged model."""
        self._progress.stage(f"Compare finalists on {self._images.chosen_on} images")
        found = self._pick(self._points(), self._budget)
        if found is None:
            raise InputError(
                f"no schedule was found for the target, {self._goal}; {self._reachable()}"
            )
        if self._costs.stopwatch is None:
            return found, None, None
        return self._timed(found, self._costs.stopwatch)

    def _pick(self, points: list[ScoredSchedule], budget: float | None) -> Finalist | None:
        if budget is not None:
            return self._finalists.best_within(points, budget)
        validation = self._images.chosen_on - self._images.search
        return self._finalists.cheapest(points, self._needed, validation)

    def _timed(self, found: Finalist, stopwatch: Stopwatch) -> tuple[Finalist, float, float]:
        """Run the chosen schedule for real; where it is too slow, choose a cheaper one."""
        target, reached, unmerged = self._goal.value, [], 0.0
        budget, cheaper = target, found
        for _ in range(LATENCY_TRIES):
            self._progress.stage("Run the chosen schedule")
            latency, unmerged = stopwatch.latency_ms([cheaper.point.r, self._unmerged])
            reached.append(latency)
            if latency <= target:
                return cheaper, latency, unmerged
            budget = min(budget, cheaper.point.cost) * target / latency * 0.99
            picked = None if self._late() else self._pick(self._points(), budget)
            if picked is None:
                break
            cheaper = picked
        raise InputError(
            f"target is {self._goal}; the fastest schedule that was run takes {min(reached):.3g} "
            f"ms, unmerged {unmerged:.3g} ms: ask for more time, or less load on this machine"
        )

    def _reachable(self) -> str:
        """The best there is, for a target that nothing meets."""
        late = ""
        if self._search.cut_short or self._cut_short:
            late = f"the time limit of {self._request.time_limit:g} s was reached, "
        if self._over_merged:
            least = self._request.min_entropy or 0.0
            late += f"{self._over_merged} schedules fall under --min-entropy {least:g}, "
        points = [point for point in self._points() if point.score.complete]
        if not points:
            return f"{late}none was measured whole; give more with --time-limit"
        best = max(points, key=lambda p: (p.score.correct, -p.score.damage, p.r))
        whole = self._finalists.measure(best)
        return (
            f"{late}the best that was found has {100 * whole.correct / whole.images:.2f} % "
            f"(unmerged {100 * self._right.mean():.2f} %): {','.join(map(str, best.r))}"
        )


def estimate(r: Rs, images: TuneImages, scorer: Scorer) -> Estimate | None:
    """What to expect on images that are not here, with its interval.

    It comes from the held-out images alone. Where there are none it comes from the validation
    images, which the schedule was chosen with: then it is optimistic. Where there are none of those
    either, nothing can be said: the search picked what is right on its own images.
    """
    whole = len(scorer.unmerged_right)
    held_out = images.chosen_on < whole
    first, last = (images.chosen_on, whole) if held_out else (images.search, images.chosen_on)
    if first == last:
        return None
    right, unmerged = scorer.right(r, first, last), scorer.unmerged_right[first:last]
    return Estimate(
        **vars(share_of(right)),
        on="held out" if held_out else "validation",
        unmerged=share_of(unmerged),
        change=paired_difference(right, unmerged),
    )
