"""``tome-export build``."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import click

from tome_export import display
from tome_export.cli.format import artifact_lines
from tome_export.cli.options import (
    EngineGroup,
    Group,
    ImagesGroup,
    PrecisionGroup,
    ReducerGroup,
    WeightsGroup,
    grouped_command,
    option,
)
from tome_export.cli.output import Terminal
from tome_export.cli.progress import working
from tome_export.merge.schedule import INFLECTION, Schedule
from tome_export.reducers import DEFAULT, reducer_class
from tome_export.spec import (
    OPSETS,
    TOWERS,
    AttentionForm,
    BatchRange,
    ImageSize,
    InputForm,
    MergeOp,
    Precision,
    SelectFeature,
    TowerOptions,
)
from tome_export.video.options import FrameMerging, VideoOptions


def image_sizes(text: str) -> tuple[ImageSize, ...]:
    """Image sizes with commas between them."""
    return tuple(map(ImageSize.parse, text.split(",")))


class SizesGroup(Group):
    """Model."""

    image_sizes: tuple[ImageSize, ...] | None = option(
        "--image-size",
        type=image_sizes,
        metavar="HxW[,HxW...]",
        help="Height and width of the images, such as 448x224, or one number; positions are "
        "resampled for it. Of several sizes, such as 224,448x224, DIR gets an artifact each.  "
        "[default: the model's own]",
    )


class TowerGroup(Group):
    """Model."""

    seed: int = option(default=0, show_default=True, help="Of random weights.")
    kind: str | None = option(
        "--tower",
        type=click.Choice(TOWERS),
        help="Cut the vision tower of a language model from a CLIP or LLaVA checkpoint.",
    )
    select_layer: int | None = option(
        metavar="N",
        help="Tower: the hidden state it gives; layers behind are cut.  [default: the model's own]",
    )
    select_feature: SelectFeature | None = option(
        help="Tower: without or with the class token.  [default: the model's own]"
    )
    projector: bool | None = option(
        help="Tower: the checkpoint's projector in the same graph.  [default: no projector]"
    )


class MergingGroup(Group):
    """Merging."""

    r: int | None = option(help="Tokens to merge per layer.  [default: the model's own]")
    schedule: str | None = option(
        metavar="|".join([*INFLECTION, "12,10,8", "FILE"]),
        help="How r is spread over the layers, or r of each, or a file that 'tome-export tune' "
        "wrote.  [default: constant]",
    )
    prop_attn: bool | None = option(
        help="Proportional attention.  [default: the model's and reducer's own]"
    )
    merge_op: MergeOp = option(
        default="auto",
        help="auto: plugin for a TensorRT engine of one batch size, where it pays, else matmul; "
        "index_add is for ONNX Runtime only.",
    )
    plugin_batch_range: bool = option(
        help="Let --merge-op plugin take several batch sizes, although TensorRT keeps GPU memory "
        "at every change (NVIDIA/TensorRT issue 4849)."
    )


class VideoGroup(Group):
    """Merging across the frames of a video."""

    frames: int | None = option(metavar="N", help="Frames of one.  [default: the model's own]")
    merge_layers: str | None = option(
        metavar="8,9,10", help="Layers, from 0, that join neighbouring clips and merge across them."
    )
    merge_frames: str | None = option(metavar="2,2,3", help="How many clips each of them joins.")
    merge_proportions: str | None = option(
        metavar="30,10",
        help="Percent of the tokens to merge across clips, and inside them from there on.",
    )
    frame_position: bool | None = option(
        help="Add the learned vector of each clip as it is joined.  [default: add]"
    )

    def video_options(self) -> VideoOptions:
        """What is asked of frames; joining needs one of its lists, the others are TempMe's then."""
        position = self.frame_position
        texts = (self.merge_layers, self.merge_frames, self.merge_proportions)
        if not any(texts):
            if position is not None:
                raise click.UsageError(
                    f"--{'' if position else 'no-'}frame-position is for frames that are joined; "
                    "give --merge-layers too, or leave it out"
                )
            return VideoOptions(self.frames)
        published = FrameMerging()
        usual = (published.layers, published.frames, published.proportions)
        layers, frames, proportions = (
            text or ",".join(map(str, own)) for text, own in zip(texts, usual, strict=True)
        )
        merging = FrameMerging.parse(layers, frames, proportions, position is not False)
        return VideoOptions(self.frames, merging)


class GraphGroup(Group):
    """What the graph takes and gives."""

    dense: bool = option(help="The features of every patch: merged, then unmerged.")
    source_map: bool = option(help="Also which final token each patch went into.")
    entropy: bool = option(
        help="Also how evenly the image is spread over its tokens, 0 to 1; see "
        "docs/over-merging.md."
    )
    compress: str | None = option(
        metavar="avgpool:12x12|resampler[:FILE]",
        help="Last stage of a tower or of --dense: the mean over each cell of a smaller grid, or a "
        "perceiver resampler.",
    )
    compress_options: tuple[str, ...] = option(
        "--compress-option",
        metavar="KEY=VALUE",
        help="An option of the compressor, such as latents=64; repeatable.",
    )

    input: InputForm = option(
        default="float32",
        help="uint8: images as decoded and cut, [batch, H, W, C]; the graph scales and normalises "
        "them. See docs/raw-pixels.md.",
    )
    attention: AttentionForm = option(
        heading="Precision",
        default="auto",
        help="auto: fused for an engine, in parts for fp32 and for ONNX Runtime on a GPU; "
        "fused-fp32: fp16 with float32 sums, for TensorRT; see docs/attention.md.",
    )
    opset: int = option(
        heading="Precision",
        type=click.IntRange(*OPSETS),
        default=OPSETS[-1],
        help="Of the ONNX model: ONNX Runtime 1.18 takes 21, 1.22 takes 22; below 23 attention is "
        "in parts. See docs/runtimes.md.",
    )


class TargetGroup(Group):
    """Engine."""

    engine: Literal["auto", "tensorrt", "tensorrt-rtx", "none"] = option(
        default="auto", help="auto: TensorRT where it and a GPU are, else TensorRT-RTX, else none."
    )
    batch: BatchRange | None = option(
        type=BatchRange.parse,
        metavar="MIN:OPT:MAX",
        help="Batch sizes; one number fixes it.  [default: 1:8:32; 8 with --merge-op plugin]",
    )


class BuildOptions(
    WeightsGroup,
    SizesGroup,
    TowerGroup,
    MergingGroup,
    ReducerGroup,
    VideoGroup,
    GraphGroup,
    PrecisionGroup,
    TargetGroup,
    EngineGroup,
    ImagesGroup,
):
    """Output."""

    output: Path | None = option(
        "-o",
        "--output",
        metavar="DIR",
        help="The artifact's directory.  [default: ./<model>[-<size>]-r<r>-<precision>]",
    )
    force: bool = option(help="Replace an existing artifact.")
    no_check: bool = option(heading="Check", help="Do not check parity; the artifact says so.")


@grouped_command(
    "build",
    "Build an artifact: merged ONNX model, engine, parity.",
    example="tome-export build vit_b16 --r 13 --fp16 -o vit_b16-r13",
)
@click.argument("model")
def command(terminal: Terminal, /, model: str, options: BuildOptions) -> None:
    """Build an artifact from MODEL.

    MODEL is a recipe ('tome-export models' lists them), timm:<name>, or module:function.
    """
    if options.no_check and options.images is not None:
        raise click.UsageError("--images are for the check that --no-check omits; give one")
    precision = options.precision
    with working(terminal) as progress:
        from tome_export.artifact import MODEL
        from tome_export.build import BuildRequest, build, build_sizes

        tower, reducer = options.request(TowerOptions), options.reducer
        video, file = options.video_options(), _schedule_file(options.schedule)
        sizes: Sequence[ImageSize | None] = options.image_sizes or (None,)
        schedules: list[Schedule | None] = [None for _ in sizes]
        own_counts = reducer != DEFAULT and reducer_class(reducer).own_counts
        if not own_counts or options.r is not None or options.schedule is not None:
            schedules = [_schedule(model, options, size, file, tower) for size in sizes]
        name = "-".join([model, *(str(size) for size in sizes if size)])
        name = name if reducer == DEFAULT else f"{name}-{reducer}"
        name = name if video.merging is None else f"{name}-across"
        same = len({str(schedule) for schedule in schedules}) == 1
        output = options.output or _default_output(name, schedules[0] if same else None, precision)
        request = options.request(
            BuildRequest,
            model=model,
            output=Path(os.path.normpath(output)),  # what is printed is what is written
            schedule_file=file,
            precision=precision,
            tower=tower,
            video=video,
            engine_options=options.engine_options(),
            check=not options.no_check,
        )
        requests = [
            replace(request, image_size=size, schedule=schedule)
            for size, schedule in zip(sizes, schedules, strict=True)
        ]
        if len(requests) > 1:
            artifacts = build_sizes(requests, progress)
        else:
            artifacts = (build(requests[0], progress),)
    values = [{"artifact": str(one.path), "manifest": one.manifest} for one in artifacts]
    lines = [line for one in artifacts for line in ("", *artifact_lines(one.manifest, one.path))]
    if len(artifacts) == 1:
        terminal.result(values[0], lines[1:])
    else:
        data = [one.manifest.files.get(f"{MODEL}.data") for one in artifacts]
        shared = data[0].bytes if data[0] is not None and data.count(data[0]) == len(data) else 0
        note = f"Weights of all {len(data)} sizes in one file: {display.size(shared)}"
        terminal.result({"artifacts": values, "shared_bytes": shared}, [*lines[1:], "", note])


def _schedule_file(text: str | None) -> Path | None:
    """The file that ``--schedule`` names; None where it is a schedule itself."""
    if text is None or text in INFLECTION:
        return None
    return Path(text) if text.endswith(".json") or Path(text).is_file() else None


def _schedule(
    model: str,
    options: BuildOptions,
    image_size: ImageSize | None,
    file: Path | None,
    tower: TowerOptions,
) -> Schedule:
    from tome_export.models import resolve

    r, text = options.r, options.schedule
    if file is not None:
        from tome_export.artifact.schedule import ScheduleFile

        if r is not None:
            raise click.UsageError(
                f"schedule file {file} gives r for every layer; drop --r {r} or the file"
            )
        return Schedule(per_layer=ScheduleFile.read(file).schedule)
    text = "constant" if text is None else text
    if r is None and text in INFLECTION:
        r = resolve(model, tower, image_size=image_size).merging.r
    return Schedule.parse(text, r)


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
