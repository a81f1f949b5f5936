"""The README's commands and code run as they stand there."""

from __future__ import annotations

import importlib
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from runpy import run_path

import pytest

README = Path(__file__).parents[1] / "README.md"


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README.read_text(), re.DOTALL | re.MULTILINE)


COMMANDS = [line for block in blocks("sh") for line in block.splitlines() if line.strip()]


def test_readme_has_commands() -> None:
    assert len(COMMANDS) >= 5
    assert all(line.startswith("tome-export ") for line in COMMANDS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder for all commands, with the images of a checkout."""
    folder = tmp_path_factory.mktemp("readme")
    (folder / "models").symlink_to(README.parent / "models")
    return folder


@pytest.mark.slow
def test_commands_run(folder: Path) -> None:
    """In one test, because a later command uses what an earlier one made."""
    for line in COMMANDS:
        run = subprocess.run(
            [sys.executable, "-m", "tome_export.cli", *shlex.split(line)[1:]],
            cwd=folder,
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "COLUMNS": "120"},
        )
        assert run.returncode == 0, f"{line}\n{run.stderr}"
        assert run.stdout.strip(), line


@pytest.mark.parametrize("code", blocks("python"))
def test_python_runs(code: str, folder: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    assert "181, 165" in run.stdout


def test_measured_figures_are_those_of_the_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(README.parent / "scripts")
    script = importlib.import_module("measured")
    made = (
        (README, script.MARKS, script.measured()),
        (README, script.EVALUATED, script.evaluated()),
        (README.parent / "docs" / "reducers.md", script.REDUCED, script.reducers_lines()),
    )
    for path, (start, end), text in made:
        assert start + text + end in path.read_text()


def test_figures_are_those_of_the_rows() -> None:
    measured = run_path(str(README.parent / "scripts" / "measured.py"))
    for path, text in measured["pages"]().items():
        assert path.read_text() == text, f"python scripts/measured.py writes another {path.name}"
