"""Write docs/commands.md, the help of every command.

python scripts/commands.py
"""

from __future__ import annotations

from pathlib import Path

from click import Context
from click.testing import CliRunner

from tome_export.cli.main import cli as program

PAGE = Path(__file__).parents[1] / "docs" / "commands.md"
INTRODUCTION = """# What options has each command?

What `--help` says, written here by `python scripts/commands.py`.
"""


def text() -> str:
    """The page."""
    runner = CliRunner(env={"COLUMNS": "100"})
    parts = [INTRODUCTION]
    for name in ("", *program.list_commands(Context(program))):
        words = [name, "--help"] if name else ["--help"]
        shown = runner.invoke(program, words, prog_name="tome-export", max_content_width=100)
        title = f"## tome-export {name}".rstrip()
        parts.append(f"{title}\n\n```text\n{shown.output.rstrip()}\n```\n")
    return "\n".join(parts)


if __name__ == "__main__":
    PAGE.write_text(text())
