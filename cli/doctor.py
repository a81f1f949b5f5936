"""``tome-export doctor``."""

from __future__ import annotations

from dataclasses import asdict

from tome_export.cli.format import table
from tome_export.cli.options import grouped_command
from tome_export.cli.output import Terminal
from tome_export.cli.progress import working


@grouped_command(
    "doctor",
    "Say what this machine can do, and what to install.",
    example="tome-export doctor --json",
)
def command(terminal: Terminal, /) -> None:
    """Say what this machine can do, and what to install for the rest."""
    with working(terminal) as progress:
        from tome_export.doctor import survey

        findings = survey(progress)
    rows = [(f.name, "yes" if f.ok else "no", f.found) for f in findings]
    fixes = [f"  {f.name}: {f.fix}" for f in findings if f.fix]
    lines = table(("", "here", "found"), rows, "lll")
    lines += ["", "For the rest:", *fixes] if fixes else []
    terminal.result({"findings": [asdict(finding) for finding in findings]}, lines)
