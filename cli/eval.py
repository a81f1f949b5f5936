"""``tome-export eval``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from tome_export.cli.options import FILE, grouped, output_options
from tome_export.cli.output import Terminal
from tome_export.cli.progress import working

COUNT = click.IntRange(min=1)


class Numbers(click.ParamType):
    """Whole numbers with commas between them."""

    name = "0,2,4,8"

    def convert(self, value: Any, param: Any, context: Any) -> tuple[int, ...]:
        """Each number once, in order."""
        if isinstance(value, tuple):
            return value
        try:
            return tuple(dict.fromkeys(int(part) for part in value.split(",")))
        except ValueError:
            self.fail(f"{value!r} is not a list of whole numbers, such as 0,2,4,8", param, context)


def _names(_context: click.Context, _param: click.Parameter, value: str) -> tuple[str, ...]:
    return () if value == "none" else tuple(dict.fromkeys(value.split(",")))


eval_options = grouped(
    click.option(
        "--data",
        multiple=True,
        required=True,
        metavar="FOLDER|FILES|samples",
        help="One sub-folder per class, or images with --labels; .tar shards "
        "('s-{000..010}.tar'); .parquet files; or the samples of the model. Repeatable.",
    ),
    click.option("--labels", type=FILE, help="Lines of 'relative/path,class' for a folder."),
    click.option("--limit", type=COUNT, help="Most images, taken evenly from all."),
    click.option("--batch", type=COUNT, help="Images per batch.  [default: the artifact's OPT]"),
    click.option(
        "--workers",
        type=click.IntRange(min=0),
        help="Processes that decode; 0 for none.  [default: one per core]",
    ),
    click.option("--r", type=Numbers(), default=(), help="Also these constant schedules."),
    click.option("--backend", default="ort-cpu", show_default=True, help="Runs the models."),
    click.option(
        "--against",
        default="unmerged,torch",
        show_default=True,
        callback=_names,
        metavar="NAMES|none",
        help="Of unmerged (on the same backend) and torch (merged, fp32).",
    ),
    click.option("--weights", metavar="PATH", help="Where the weights are now."),
    click.option("--ray", metavar="local|ADDRESS", help="Run on Ray Data, an actor per device."),
    click.option("--restart", is_flag=True, help="Do not go on where it was interrupted."),
)


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
        **result.evaluation.model_dump(mode="json"),
        "unrecorded": result.unrecorded,
    }
    terminal.result(values, eval_lines(values, manifest))
