"""The trained weights that a script takes out of a public package: made once for a run."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "trained-weights.md"
UNREACHABLE = re.compile(r"connection|timed out|max retries", re.IGNORECASE)


def page_commands() -> list[str]:
    """The commands of the page on trained weights, in their order; the first makes the weights."""
    found = re.findall(r"^```sh\n(.*?)^```", PAGE.read_text(), re.DOTALL | re.MULTILINE)
    return [line for block in found for line in block.splitlines() if line.strip()]


def run_command(line: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """A command of the page, run in a folder."""
    program, *arguments = shlex.split(line)
    start = {"python": [], "tome-export": ["-m", "tome_export.cli"]}[program]
    return subprocess.run(
        [sys.executable, *start, *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PIP_RETRIES": "1", "COLUMNS": "120"},
    )


def make_trained_folder(folder: Path) -> Path:
    """Run the page's first command in a folder; skip where no package can be downloaded."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("scripts", "models"):
        if not (folder / name).exists():
            (folder / name).symlink_to(ROOT / name)
    line = page_commands()[0]
    done = run_command(line, folder)
    if done.returncode == 4 and UNREACHABLE.search(done.stderr):
        pytest.skip(f"no trained weights: {done.stderr.strip()}")
    assert done.returncode == 0, f"{line}\n{done.stderr}"
    return folder / shlex.split(line)[-1]
