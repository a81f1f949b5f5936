"""``tome-export bench``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from tome_export.cli.bench_text import bench_lines
from tome_export.cli.options import FILE, output_options
from tome_export.cli.output import Terminal
from tome_export.cli.progress import working
from tome_export.cli.text import model_lines


def _names(_context: Any, _param: Any, values: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(part.strip() for value in values for part in value.split(","))


def _numbers(context: Any, param: Any, values: tuple[str, ...]) -> tuple[int, ...]:
    names = _names(context, param, values)
    return tuple(int(click.INT.convert(text, param, context)) for text in names)


@click.command("bench", short_help="Time it against the unmerged model, and show where time goes.")
@click.argument("artifact", type=FILE)
@click.option(
    "--batch",
    "batches",
    multiple=True,
    callback=_numbers,
    metavar="N",
    help="Images per run; repeatable, or 1,8.  [default: 1 and the one it is tuned for]",
)
@click.option(
    "--against",
    default="unmerged",
    show_default=True,
    metavar="unmerged|ARTIFACT",
    help="What to compare with: the same model without merging, or another artifact.",
)
@click.option(
    "--backend",
    "backends",
    multiple=True,
    callback=_names,
    metavar="ort-cpu|ort-cuda|tensorrt|tensorrt-rtx|torch",
    help="Run on this; repeatable.  [default: ort-cpu and every engine that can run here]",
)
@click.option("--rounds", default=20, show_default=True, help="Timed runs of each model.")
@click.option("--warmup", default=3, show_default=True, help="Untimed runs of each, first.")
@click.option(
    "--weights", metavar="PATH", help="Where the weights are now, if not where they were."
)
@click.option("--profile/--no-profile", default=True, help="Time per part of the model.")
@output_options
@click.pass_obj
def command(terminal: Terminal, artifact: Path, **options: Any) -> None:
    """Measure latency, throughput and memory of ARTIFACT beside another model, in turn."""
    with working(terminal) as progress:
        from tome_export.pipeline.bench import BenchRequest, bench

        result = bench(BenchRequest(artifact, **options), progress)
    manifest = result.artifact.manifest
    values = {
        "artifact": str(result.artifact.path),
        "model": manifest.model.name,
        "random_weights": manifest.model.random_weights,
        **result.bench,
        "unrecorded": result.unrecorded,
    }
    lines = [*model_lines(manifest), "", *bench_lines(result.bench)]
    if result.unrecorded:
        lines.append(f"The result was not recorded: {result.unrecorded}")
    terminal.result(values, lines)
