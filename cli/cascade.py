"""``tome-export cascade``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from tome_export.cli.cascade_options import cascade_options, goal_given
from tome_export.cli.cascade_text import cascade_lines
from tome_export.cli.options import FILE, output_options
from tome_export.cli.output import Terminal
from tome_export.cli.progress import working
from tome_export.cli.tune import goal_from_option


@click.command("cascade", short_help="A budget for each image, out of several artifacts.")
@click.argument("artifacts", nargs=-1, required=True, type=FILE, metavar="LOW HIGH [MORE]...")
@cascade_options
@output_options
@click.pass_obj
def command(terminal: Terminal, artifacts: tuple[Path, ...], **given: Any) -> None:
    """Calibrate which of several artifacts of one model an image gets; give exactly one target.

    complexity chooses by the differences of neighbouring pixels. confidence starts at the lowest
    artifact and goes on to the next while it is unsure. learned chooses by a linear head on the
    pooled patch embedding.
    """
    name = goal_given(given)
    with working(terminal) as progress:
        from tome_export.pipeline.cascade import CascadeRequest, cascade

        goal = goal_from_option(name, given[name])
        kept = {k: v for k, v in given.items() if k not in ("target_macs", "min_accuracy")}
        result = cascade(CascadeRequest(artifacts, goal=goal, **kept), progress)
    values = {"file": str(result.path), "page": str(result.page), **result.values}
    terminal.result(values, cascade_lines(values))
