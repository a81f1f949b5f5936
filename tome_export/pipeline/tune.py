"""``tome-export tune``: search a model's per-layer schedule for one target."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tome_export.errors import InputError, UsageError
from tome_export.merge.schedule import Schedule
from tome_export.pipeline.check import check_entropy_option
from tome_export.pipeline.manifest import output_shape, state_sha256
from tome_export.data.find import SAMPLES
from tome_export.pipeline.tune_images import TuneImages, sized, tune_images
from tome_export.pipeline.tune_result import values_of
from tome_export.pipeline.tune_run import TuneRun
from tome_export.pipeline.tune_score import Scorer
from tome_export.progress import Progress, Silent
from tome_export.reducers import DEFAULT
from tome_export.spec import Precision
from tome_export.tune.goal import Goal
from tome_export.tune.schedule_file import check_writable, read_schedule, write_schedule

if TYPE_CHECKING:
    from tome_export.models import LoadedModel, Recipe
    from tome_export.patch import MergedModel


@dataclass(frozen=True)
class TuneRequest:
    """What to search.

    Attributes:
        model: Recipe name, ``timm:<name>`` or ``module:function``.
        goal: The target.
        output: The schedule file.
        data: A folder or shards of images; ``samples`` for those that come along.
        limit: Most images; None for as many as a search in minutes can take.
        weights: ``pretrained``, ``random`` or the path of a checkpoint.
        batch: Images per run, for latency.
        precision: Of the model whose latency is measured; classes are counted in fp32.
        time_limit: Seconds of search after which the best by then is taken.
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
    limit: int | None = None
    weights: str = "pretrained"
    batch: int = 1
    precision: Precision = "fp32"
    time_limit: float = 600.0
    seed: int = 0
    force: bool = False
    reducer: str = DEFAULT
    reducer_options: tuple[str, ...] = ()
    min_entropy: float | None = None


@dataclass(frozen=True)
class TuneResult:
    """What a search found.

    Attributes:
        path: The schedule file.
        values: Its content.
    """

    path: Path
    values: dict[str, Any]


def tune(request: TuneRequest, progress: Progress | None = None) -> TuneResult:
    """Search a schedule and write it to a file; nothing is written if none meets the target.

    Raises:
        InputError: if model, weights, data or output are not usable, or no schedule that merges
            anything meets the target; the message says what can be reached.
        UsageError: if a number is out of range.
        MissingComponentError: if latency is asked for and onnxruntime is not here.
    """
    from tome_export.reducers.options import json_from_reducer

    start = time.monotonic()
    progress = progress or Silent()
    _check_numbers(request)
    check_writable(request.output, force=request.force)
    progress.stage(f"Load {request.model}")
    loaded, model = _load(request)
    progress.detail(f"weights: {loaded.weights.kind}, {loaded.weights.source}")
    images = _images(request, loaded.recipe, model, progress)
    progress.stage(f"Measure the unmerged model on {len(images.pixels)} images")
    with Scorer(model, images) as scorer:
        run = TuneRun(request, loaded.recipe.output_name, model, images, scorer, progress)
        found = run.chosen()
        values = values_of(
            model=loaded.recipe.name,
            weights=loaded.weights,
            goal=request.goal,
            batch=request.batch,
            precision=request.precision,
            images=images,
            scorer=scorer,
            space=run.space,
            found=found,
            constant=run.best_constant(),
            front=run.front(),
            table=run.table,
            reducer=json_from_reducer(model.settings.reducer),
            min_entropy=request.min_entropy,
            over_merged=run.over_merged,
            searched=len(run.search.points),
            seconds=time.monotonic() - start,
        )
    content = write_schedule(
        request.output,
        values,
        force=request.force,
        tokens_in=run.space.tokens,
        state_sha256=state_sha256(model),
    )
    return TuneResult(request.output, content)


def schedule_from_file(path: Path) -> Schedule:
    """The schedule in a file that ``tune`` wrote.

    Raises:
        InputError: if it is not such a file.
    """
    return Schedule(per_layer=read_schedule(path).schedule)


def goal_of(name: str, value: Any) -> Goal:
    """A target from the command line's option of that name, with underscores.

    Raises:
        InputError: if the value is not one.
    """
    if name == "target_latency_ms":
        return Goal.target_latency(value)
    return Goal.target_macs(value) if name == "target_macs" else Goal.min_accuracy(value)


def _check_numbers(request: TuneRequest) -> None:
    if request.batch < 1:
        raise UsageError(f"--batch is {request.batch}; expected at least 1 image per run")
    if not request.time_limit > 0:
        raise UsageError(f"--time-limit is {request.time_limit:g}; expected seconds above 0")
    if request.seed < 0:
        raise UsageError(f"--seed is {request.seed}; expected 0 or more")
    check_entropy_option(request.min_entropy)


def _load(request: TuneRequest) -> tuple[LoadedModel, MergedModel]:
    from tome_export.models import resolve
    from tome_export.patch import patch
    from tome_export.reducers.options import reducer_from_text

    reducer = reducer_from_text(request.reducer, request.reducer_options)
    if request.min_entropy is not None and not reducer.counts_patches:
        raise InputError(
            f"reducer {reducer.name} weighs the size of a token by similarity, so --min-entropy "
            "cannot count its patches; leave --min-entropy out"
        )
    recipe = replace(resolve(request.model), reducer_keys=reducer.own_keys)
    if recipe.output_name != "logits":
        raise InputError(
            f"{recipe.name} gives {recipe.output_name}, not classes to count; tune a classifier, "
            "or give a schedule to 'tome-export build' yourself"
        )
    loaded = recipe.load(weights=request.weights, seed=request.seed)
    prop_attn = recipe.prop_attn and reducer.prop_attn
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


def _images(
    request: TuneRequest, recipe: Recipe, model: MergedModel, progress: Progress
) -> TuneImages:
    progress.stage("Read images")
    return tune_images(
        sized(recipe, model.image_size),
        model.macs(merged=False),
        output_shape(model)[-1],
        request.data,
        request.limit,
        request.seed,
        progress,
    )
