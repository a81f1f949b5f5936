"""``tome-export predict``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import click

from tome_export.cli.format import (
    answer_lines,
    answer_values,
    artifact_values,
    fields,
    table,
    warning_lines,
)
from tome_export.cli.options import FILE, QueryGroup, grouped_command, option
from tome_export.cli.output import Terminal
from tome_export.cli.progress import working
from tome_export.display import percent
from tome_export.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tome_export.data.answers import ImageAnswer
    from tome_export.predict.main import MapAnswer, PredictResult


class PredictOptions(QueryGroup):
    """Output."""

    backend: str = option(heading="Engine", default="ort-cpu", help="What runs the model.")
    top: int = option(default=5, metavar="K", help="Labels per image.")
    output: Path | None = option(
        "-o",
        "--output",
        metavar="FILE.npy|FOLDER",
        help="Write features, a row per image, or a PNG of each dense map.",
    )
    raw: bool = option(help="Beside each PNG a .npy of the map's values.")
    force: bool = option(help="Replace the file, or the folder of an earlier run.")


@grouped_command(
    "predict",
    "Labels, features or dense maps of images.",
    example="tome-export predict vit_b16-r13 cat.jpg --top 3",
)
@click.argument("artifact", type=FILE)
@click.argument("images", nargs=-1, required=True, type=FILE, metavar="IMAGE...")
def command(
    terminal: Terminal, /, artifact: Path, images: tuple[Path, ...], options: PredictOptions
) -> None:
    """Print what ARTIFACT says of each IMAGE or video (a file or a folder).

    A classifier gives labels with scores, a tower features, a dense model a map of the image as the
    model sees it: resized and cut. An image that cannot be read is left out, and the exit code is
    3.
    """
    with working(terminal) as progress:
        from tome_export.predict.main import PredictRequest, predict

        request = options.request(PredictRequest, artifact=artifact, images=images)
        result = predict(request, progress)
    output = result.artifact.manifest.output
    values = {
        **artifact_values(result.artifact),
        "backend": result.backend,
        "kind": result.artifact.manifest.output_kind,
        "output": {"name": output.name, "shape": list(output.shape[1:])},
        "file": None if result.output is None else str(result.output),
        "images": [_values(answer) for answer in result.answers],
        "failed": result.failed,
    }
    error = None
    if result.failed:
        first = result.failed[0]
        total = len(result.failed) + len(result.answers)
        error = InputError(
            f"{len(result.failed)} of {total} images could not be used; the first is {first.name}: "
            f"{first.reason}"
        )
    terminal.result_with(values, _lines(result, options.top), error)


def _values(answer: ImageAnswer | MapAnswer) -> dict[str, Any]:
    from tome_export.data.answers import ImageAnswer

    if isinstance(answer, ImageAnswer):
        return answer_values(answer)
    labels = None if answer.labels is None else [vars(label) for label in answer.labels]
    return {**vars(answer), "image": str(answer.image), "labels": labels}


def _lines(result: PredictResult, top: int) -> list[str]:
    manifest, output = result.artifact.manifest, result.output
    facts = {
        "Model": manifest.model.name,
        "Backend": result.backend,
        "Output": f"{manifest.output.name} {list(manifest.output.shape[1:])}",
    }
    lines = [*warning_lines(manifest), *fields(facts)]
    if manifest.output_kind == "map":
        lines += ["", *_map_lines(cast("Sequence[MapAnswer]", result.answers), top)]
    elif output is None:
        for answer in cast("Sequence[ImageAnswer]", result.answers):
            lines += ["", str(answer.image), *(f"  {line}" for line in answer_lines(answer))]
    if result.failed:
        lines += ["", "Not used:", *(f"  {one.name}: {one.reason}" for one in result.failed)]
    if result.shape is not None:
        lines += ["", f"Features: {output}, {list(result.shape)}, in the order of the images"]
        lines += ["Rows of images that were not used are NaN"] if result.failed else []
    elif output is not None:
        _, height, width = manifest.preprocessing.input_size
        lines += [
            "",
            f"Pictures: {output}, of images as the model sees them: resized, and cut to "
            f"{height} x {width} around the centre",
        ]
    return lines


def _map_lines(answers: Sequence[MapAnswer], top: int) -> list[str]:
    """Range of each map; of several channels the share of each that is the largest somewhere."""
    written = ["file"] if answers[0].file else []
    rows = [
        (
            one.image,
            "x".join(map(str, one.shape)),
            f"{one.low:.4g}",
            f"{one.high:.4g}",
            *(one.file for _ in written),
        )
        for one in answers
    ]
    headers = ("image", "shape", "lowest", "highest", *written)
    lines = table(headers, rows, "lrrr" + "l" * len(written))
    for one in answers:
        if one.labels:
            shares = [(x.label, percent(x.score, 1), x.index) for x in one.labels[:top]]
            lines += ["", str(one.image), *table(("label", "share", "index"), shares, "lrr")]
    return lines
