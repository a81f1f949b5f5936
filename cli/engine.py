"""``tome-export engine``."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import click

from tome_export.cli.format import engine_lines, file_lines, warning_lines
from tome_export.cli.options import FILE, EngineGroup, grouped_command, option
from tome_export.cli.output import Terminal
from tome_export.cli.progress import working
from tome_export.spec import BatchRange


class EngineCommandOptions(EngineGroup):
    """Engine."""

    engine: Literal["auto", "tensorrt", "tensorrt-rtx"] = option(
        default="auto", help="auto: TensorRT where it and a GPU are, else TensorRT-RTX."
    )
    batch: BatchRange | None = option(
        type=BatchRange.parse, metavar="MIN:OPT:MAX", help="Batch sizes.  [default: the artifact's]"
    )


@grouped_command(
    "engine",
    "Build only the engine, from a ready artifact.",
    example="tome-export engine vit_b16-r13 --engine tensorrt --workspace 4GiB",
)
@click.argument("artifact", type=FILE)
def command(terminal: Terminal, /, artifact: Path, options: EngineCommandOptions) -> None:
    """Build an engine from the ONNX model of ARTIFACT and add it there.

    Needs no PyTorch: run it on the machine whose GPU will run the engine.
    """
    with working(terminal) as progress:
        from tome_export.build.engine import EngineRequest, add_engine

        settings = options.engine_options()
        request = options.request(EngineRequest, artifact=artifact, options=settings)
        done = add_engine(request, progress)
    manifest = done.manifest
    values = {
        "artifact": str(done.path),
        "random_weights": manifest.model.random_weights,
        "engines": manifest.engines,
        "engine_note": manifest.engine_note,
        "files": manifest.files,
    }
    lines = [*warning_lines(manifest), *engine_lines(manifest), ""]
    terminal.result(values, [*lines, *file_lines(manifest, done.path)])
