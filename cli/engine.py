"""``tome-export engine``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from tome_export.cli.options import FILE, Batch, engine_options, output_options
from tome_export.cli.output import Terminal
from tome_export.cli.progress import working
from tome_export.cli.request import engine_options_of
from tome_export.cli.text import engine_lines, file_lines, warning_lines


@click.command("engine", short_help="Build only the engine, from a ready artifact.")
@click.argument("artifact", type=FILE)
@click.option(
    "--engine",
    type=click.Choice(["auto", "tensorrt", "tensorrt-rtx"]),
    default="auto",
    show_default=True,
    help="auto: TensorRT where it and a GPU are, else TensorRT-RTX.",
)
@click.option("--batch", type=Batch(), help="Batch sizes.  [default: the artifact's]")
@engine_options
@output_options
@click.pass_obj
def command(terminal: Terminal, /, artifact: Path, **given: Any) -> None:
    """Build an engine from the ONNX model of ARTIFACT and add it there.

    Needs no PyTorch: run it on the machine whose GPU will run the engine.
    """
    with working(terminal) as progress:
        from tome_export.build.engine import EngineRequest, add_engine

        options = engine_options_of(given)
        request = EngineRequest(artifact, given["engine"], options, given["batch"])
        done = add_engine(request, progress)
    manifest = done.manifest
    values = {
        "artifact": str(done.path),
        "random_weights": manifest.model.random_weights,
        "engines": manifest.engines,
        "engine_note": manifest.engine_note,
        "files": manifest.files,
    }
    lines = [
        *warning_lines(manifest),
        *engine_lines(manifest),
        "",
        *file_lines(manifest, done.path),
    ]
    terminal.result(values, lines)
