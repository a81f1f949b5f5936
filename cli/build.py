"""``tome-export build``."""

from __future__ import annotations

from typing import Any

import click

from tome_export.cli.options import (
    FILE,
    engine_choice,
    engine_options,
    images_option,
    model_options,
    output_options,
)
from tome_export.cli.output import Terminal
from tome_export.cli.progress import working
from tome_export.cli.request import build_request, precision_of
from tome_export.cli.text import artifact_lines


@click.command("build", short_help="Build an artifact: merged ONNX model, engine, parity.")
@click.argument("model")
@model_options
@engine_choice
@engine_options
@images_option
@click.option("--no-check", is_flag=True, help="Do not check parity; the artifact says so.")
@click.option(
    "-o",
    "--output",
    type=FILE,
    metavar="DIR",
    help="The artifact's directory.  [default: ./<model>-r<r>-<precision>]",
)
@click.option("--force", is_flag=True, help="Replace an existing artifact.")
@output_options
@click.pass_obj
def command(terminal: Terminal, /, model: str, **given: Any) -> None:
    """Build an artifact from MODEL.

    MODEL is a recipe ('tome-export models' lists them), timm:<name>, or module:function.
    """
    precision = precision_of(given)
    if given["no_check"] and given["images"] is not None:
        raise click.UsageError("--images are for the check that --no-check omits; give one")
    with working(terminal) as progress:
        from tome_export.build import build

        artifact = build(build_request(model, precision, given), progress)
    manifest = artifact.manifest
    values = {"artifact": str(artifact.path), "manifest": manifest}
    terminal.result(values, artifact_lines(manifest, artifact.path))
