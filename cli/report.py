"""``tome-export report``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from tome_export.cli.format import warning_lines
from tome_export.cli.options import FILE, Group, grouped_command, option
from tome_export.cli.output import Terminal
from tome_export.cli.progress import working
from tome_export.display import size

if TYPE_CHECKING:
    from tome_export.report.main import ReportResult


class ReportOptions(Group):
    """Output."""

    output: Path | None = option(
        "-o", "--output", metavar="FILE", help="The page.  [default: report.html in the artifact]"
    )
    samples: int = option(
        default=4, help="Images that come along to show with their merged tokens."
    )


@grouped_command(
    "report",
    "Write one HTML page with all that was found.",
    example="tome-export report vit_b16-r13 cat.jpg -o report.html",
)
@click.argument("artifact", type=FILE)
@click.argument("images", nargs=-1, type=FILE, metavar="[IMAGE...]")
def command(
    terminal: Terminal, /, artifact: Path, images: tuple[Path, ...], options: ReportOptions
) -> None:
    """Write all that is known of ARTIFACT as one HTML page, which loads nothing from anywhere.

    What check, bench, eval and tune found is in it where they were run, and each IMAGE with the
    tokens it was merged to, layer by layer.
    """
    with working(terminal) as progress:
        from tome_export.report.main import ReportRequest, report

        request = options.request(ReportRequest, artifact=artifact, images=images)
        done = report(request, progress)
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
