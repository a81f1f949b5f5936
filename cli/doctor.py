"""``tome-export doctor``."""

from __future__ import annotations

from dataclasses import asdict

import click

from tome_export.cli.options import output_options
from tome_export.cli.output import Terminal, table
from tome_export.cli.progress import working


@click.command("doctor", short_help="Say what this machine can do, and what to install.")
@output_options
@click.pass_obj
def command(terminal: Terminal) -> None:
    """Say what this machine can do, and what to install for the rest."""
    with working(terminal) as progress:
        from tome_export.doctor import survey

        findings = survey(progress)
    rows = [(f.name, "yes" if f.ok else "no", f.found) for f in findings]
    fixes = [f"  {f.name}: {f.fix}" for f in findings if f.fix]
    lines = table(("", "here", "found"), rows, "lll")
    lines += ["", "For the rest:", *fixes] if fixes else []
    terminal.result({"findings": [asdict(finding) for finding in findings]}, lines)
