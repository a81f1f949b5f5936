"""From parsed options to what the pipeline takes."""

from __future__ import annotations

import os
import re
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import click

from tome_export.merge.schedule import INFLECTION, Schedule
from tome_export.reducers import DEFAULT, reducer_class
from tome_export.spec import PRECISIONS, Precision, TowerOptions
from tome_export.video.options import FrameMerging, VideoOptions

if TYPE_CHECKING:
    from tome_export.build import BuildRequest
    from tome_export.engine import EngineOptions

__all__ = ["build_request", "engine_options_of", "precision_of"]


def precision_of(given: dict[str, Any]) -> Precision:
    """The one precision that was asked for; fp32 if none was.

    Raises:
        click.UsageError: if several were.
    """
    asked = [name for name in PRECISIONS if given[name]]
    if len(asked) > 1:
        raise click.UsageError(f"--{' and --'.join(asked)} exclude each other; give one")
    return asked[0] if asked else get_args(Precision)[0]


def engine_options_of(given: dict[str, Any]) -> EngineOptions:
    """Engine settings from ``options.engine_options``."""
    from tome_export.engine import EngineOptions

    names = (
        "workspace_bytes",
        "optimization_level",
        "timing_cache",
        "version_compatible",
        "hardware_compatible",
        "compute_capabilities",
    )
    return EngineOptions(**{name: given[name] for name in names})


def build_request(model: str, precision: Precision, given: dict[str, Any]) -> BuildRequest:
    """What ``tome-export build`` was asked for.

    Raises:
        InputError: if the schedule is not one, or the model unknown.
    """
    from tome_export.build import BuildRequest

    tower = TowerOptions(**{field.name: given[field.name] for field in fields(TowerOptions)})
    file = _schedule_file(given["schedule"])
    own = given["reducer"] != DEFAULT and reducer_class(given["reducer"]).own_counts
    counts_given = given["r"] is not None or given["schedule"] is not None
    schedule = None
    if counts_given or not own:
        schedule = _schedule(model, given["r"], given["schedule"], file, tower)
    name = model if given["reducer"] == DEFAULT else f"{model}-{given['reducer']}"
    video = _video(given)
    name = name if video.merging is None else f"{name}-across"
    return BuildRequest(
        model=model,
        schedule_file=file,
        output=_output(given["output"]) or _default_output(name, schedule, precision),
        schedule=schedule,
        precision=precision,
        tower=tower,
        video=video,
        engine_options=engine_options_of(given),
        check=not given["no_check"],
        **{
            name: given[name]
            for name in (
                "weights",
                "weights_key",
                "seed",
                "activation",
                "prop_attn",
                "reducer",
                "reducer_options",
                "dense",
                "source_map",
                "entropy",
                "compress",
                "compress_options",
                "batch",
                "merge_op",
                "attention",
                "opset",
                "plugin_batch_range",
                "engine",
                "images",
                "force",
            )
        },
    )


def _video(given: dict[str, Any]) -> VideoOptions:
    """What is asked of frames; joining needs one of its lists, the others are TempMe's then.

    Raises:
        InputError: if a list is not one, or they do not belong together.
        click.UsageError: if the frame position was chosen and nothing is joined.
    """
    position = given["frame_position"]
    texts = {key: given[key] for key in ("merge_layers", "merge_frames", "merge_proportions")}
    if not any(texts.values()):
        if position is not None:
            raise click.UsageError(
                f"--{'' if position else 'no-'}frame-position is for frames that are joined; give "
                "--merge-layers too, or leave it out"
            )
        return VideoOptions(given["frames"])
    published = FrameMerging()
    usual = (published.layers, published.frames, published.proportions)
    layers, frames, proportions = (
        text or ",".join(map(str, own)) for text, own in zip(texts.values(), usual, strict=True)
    )
    merging = FrameMerging.parse(layers, frames, proportions, position is not False)
    return VideoOptions(given["frames"], merging)


def _schedule_file(text: str | None) -> Path | None:
    """The file that ``--schedule`` names; None where it is a schedule itself."""
    if text is None or text in INFLECTION:
        return None
    return Path(text) if text.endswith(".json") or Path(text).is_file() else None


def _schedule(
    model: str, r: int | None, text: str | None, file: Path | None, tower: TowerOptions
) -> Schedule:
    from tome_export.models.catalog import recommended_r

    if file is not None:
        from tome_export.artifact.schedule import ScheduleFile

        if r is not None:
            raise click.UsageError(
                f"schedule file {file} gives r for every layer; drop --r {r} or the file"
            )
        return Schedule(per_layer=ScheduleFile.read(file).schedule)
    text = "constant" if text is None else text
    if r is None and text in INFLECTION:
        r = recommended_r(model, tower)
    return Schedule.parse(text, r)


def _output(given: Path | None) -> Path | None:
    """Without ``..``, so that what is printed is what is written."""
    return None if given is None else Path(os.path.normpath(given))


def _default_output(name: str, schedule: Schedule | None, precision: Precision) -> Path:
    """``./<name>-r<r>-<precision>``, with r as the schedule has it; without one no r."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "_", name.strip())
    if schedule is None:
        return Path(f"{name}-{precision}")
    if schedule.per_layer is not None:
        r = "-".join(map(str, schedule.per_layer))
    else:
        kind = str(schedule).split()[-1]
        r = f"{schedule.r}" if kind == "constant" else f"{schedule.r}-{kind}"
    return Path(f"{name}-r{r}-{precision}")
