"""``tome-export tune``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from tome_export.cli.options import FILE, output_options, reducer_options
from tome_export.cli.output import Terminal
from tome_export.cli.progress import working
from tome_export.cli.request import precision_of
from tome_export.cli.tune_text import schedule_lines

TARGETS = ("target_latency_ms", "target_macs", "min_accuracy")
KEPT = ("limit", "weights", "batch", "time_limit", "seed", "force", "min_entropy", "reducer")


@click.command("tune", short_help="Search the per-layer schedule for a target.")
@click.argument("model")
@click.option(
    "--target-latency-ms", type=float, metavar="X", help="At most X ms per run (ORT CPU)."
)
@click.option("--target-macs", metavar="50%|8.7G", help="At most so many MACs, or of the unmerged.")
@click.option(
    "--min-accuracy",
    metavar="-0.5|97.2",
    help="-0.5: at most half a point below the unmerged model; 97.2: percent.",
)
@click.option(
    "--data",
    multiple=True,
    metavar="FOLDER|SHARDS|samples",
    help="Images: top-1 with class sub-folders, else agreement with the unmerged model.  "
    "[default: samples]",
)
@click.option("--limit", type=int, metavar="N", help="Most images.  [default: 2048, or fewer]")
@click.option(
    "--weights", default="pretrained", show_default=True, metavar="pretrained|random|PATH"
)
@click.option("--batch", default=1, show_default=True, help="Images per run, for latency.")
@click.option("--fp16", is_flag=True, help="Latency in half precision.")
@click.option("--bf16", is_flag=True, help="Latency in bfloat16.")
@click.option("--fp32", is_flag=True, help="Latency in single precision, the default.")
@reducer_options
@click.option("--min-entropy", type=float, metavar="X", help="Least token-size entropy, 0 to 1.")
@click.option("--time-limit", default=600.0, show_default=True, help="Seconds of search.")
@click.option("--seed", default=0, show_default=True, help="Of images, their split, the search.")
@click.option(
    "-o", "--output", type=FILE, default="schedule.json", show_default=True, metavar="FILE"
)
@click.option("--force", is_flag=True, help="Replace an existing file.")
@output_options
@click.pass_obj
def command(terminal: Terminal, model: str, output: Path, **given: Any) -> None:
    """Search how many tokens each layer of MODEL should merge; give exactly one target.

    The schedule goes into a file for 'tome-export build MODEL --schedule FILE'.
    """
    asked = [name for name in TARGETS if given[name] is not None]
    if len(asked) != 1:
        options = ", ".join(f"--{name.replace('_', '-')}" for name in TARGETS)
        raise click.UsageError(f"{len(asked)} targets were given; give exactly one of {options}")
    precision = precision_of(given)
    with working(terminal) as progress:
        from tome_export.pipeline.tune import TuneRequest, goal_of, tune

        goal = goal_of(asked[0], given[asked[0]])
        more: dict[str, Any] = {name: given[name] for name in KEPT}
        more["reducer_options"] = given["reducer_options"]
        if given["data"]:
            more["data"] = given["data"]
        result = tune(TuneRequest(model, goal, output, precision=precision, **more), progress)
    values = {"file": str(result.path), **result.values}
    terminal.result(values, schedule_lines(result.values, result.path))
