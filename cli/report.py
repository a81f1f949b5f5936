"""``tome-export report``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from tome_export.cli.options import FILE, output_options
from tome_export.cli.output import Terminal, size
from tome_export.cli.progress import working
from tome_export.cli.text import warning_lines

if TYPE_CHECKING:
    from tome_export.report.main import ReportResult


@click.command("report", short_help="Write one HTML page with all that was found.")
@click.argument("artifact", type=FILE)
@click.argument("images", nargs=-1, type=FILE, metavar="[IMAGE...]")
@click.option(
    "-o",
    "--output",
    type=FILE,
    metavar="FILE",
    help="The page.  [default: report.html in the artifact]",
)
@click.option(
    "--samples",
    type=int,
    default=4,
    show_default=True,
    help="Images that come along to show with their merged tokens.",
)
@output_options
@click.pass_obj
def command(
    terminal: Terminal,
    /,
    artifact: Path,
    images: tuple[Path, ...],
    output: Path | None,
    samples: int,
) -> None:
    """Write all that is known of ARTIFACT as one HTML page, which loads nothing from anywhere.

    What check, bench, eval and tune found is in it where they were run, and each IMAGE with the
    tokens it was merged to, layer by layer.
    """
    with working(terminal) as progress:
        from tome_export.report.main import ReportRequest, report

        done = report(ReportRequest(artifact, images, output, samples), progress)
    terminal.result(done.to_dict(), _lines(done))


def _lines(done: ReportResult) -> list[str]:
    missing = [f"Not in it yet: {title}; {command}" for title, command in done.missing.items()]
    note = [f"No pictures: {done.note}"] if done.note else []
    return [
        *warning_lines(done.artifact.manifest),
        *missing,
        *done.changed,
        *note,
        f"Report: {done.path}, {size(done.size)}",
    ]
