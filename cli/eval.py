"""``tome-export eval``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from tome_export.cli.eval_options import eval_options
from tome_export.cli.options import FILE, output_options
from tome_export.cli.output import Terminal
from tome_export.cli.progress import working


@click.command("eval", short_help="Top-1 and top-5 on labelled images, merged against unmerged.")
@click.argument("artifact", type=FILE)
@eval_options
@output_options
@click.pass_obj
def command(terminal: Terminal, **options: Any) -> None:
    """Measure the accuracy of ARTIFACT; go on where the same command was interrupted."""
    artifact: Path = options.pop("artifact")
    with working(terminal) as progress:
        from tome_export.cli.eval_text import eval_lines
        from tome_export.pipeline.eval import EvalRequest, evaluate

        result = evaluate(EvalRequest(artifact, **options), progress)
    manifest = result.artifact.manifest
    values = {
        "artifact": str(result.artifact.path),
        "model": manifest.model.name,
        "random_weights": manifest.model.random_weights,
        **result.values,
        "unrecorded": result.unrecorded,
    }
    terminal.result(values, eval_lines(values, manifest))
