"""README and docs: commands and code run, links lead somewhere, figures are current."""

from __future__ import annotations

import importlib
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tome_export.artifact import Artifact

ROOT = Path(__file__).parents[1]
README, DOCS = ROOT / "README.md", ROOT / "docs"
PAGES = [README, ROOT / "CONTRIBUTING.md", *sorted(DOCS.glob("*.md"))]
# In this order later commands find what earlier ones made.
RUN = ("install", "build", "predict", "which-r", "cascade", "pictures", "plugins", "serve")
WORDS = 750


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)


COMMANDS = [
    line
    for name in RUN
    for block in blocks(DOCS / f"{name}.md", "sh")
    for line in block.splitlines()
    if line.strip()
]
CONSOLE = [block.removeprefix("$ ").split("\n", 1) for block in blocks(README, "console")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder for all commands, with the images of a checkout."""
    folder = tmp_path_factory.mktemp("readme")
    (folder / "models").symlink_to(ROOT / "models")
    return folder


def run(line: str, folder: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "tome_export.cli", *shlex.split(line)[1:]],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "COLUMNS": "120"},
    )
    assert done.returncode == 0, f"{line}\n{done.stderr}"
    assert done.stdout.strip(), line
    return done.stdout


def pattern(shown: str, folder: Path) -> str:
    """Output as the page shows it; ``...`` stands for any lines.

    Counts and ratios have to be those of the page. What rounding decides, which hangs on the
    processor, may be any figure: errors, cosines, and how many decisions differ.
    """
    parts = []
    for line in shown.splitlines():
        if line == "...":
            parts.append(r"(?:.*\n)*?")
            continue
        text = re.escape(line).replace("out/", f"(?:{re.escape(str(folder))}/)?out/")
        if "cosine" in line:
            text = re.sub(r"\d+(?:\\\.\d+)?(?:e\\[-+]\d+)?", r"[-+.e\\d]+", text)
        if "disagreements" in line:
            text = re.sub(
                r"disagreements.*explained", r"disagreements\\ \\d+ \\(\\d+\\ explained", text
            )
        parts.append(text + "\n")
    return "".join(parts)


@pytest.mark.slow
def test_commands_run(folder: Path) -> None:
    """In one test, because a later command uses what an earlier one made."""
    assert len(CONSOLE) == 3
    assert len(COMMANDS) >= 10
    for line, shown in CONSOLE:
        output = run(line, folder)
        assert re.fullmatch(pattern(shown, folder), output), f"{line} prints\n{output}"
    for line in COMMANDS:
        assert line.startswith("tome-export ")
        run(line, folder)


def test_python_runs(tmp_path: Path) -> None:
    """The blocks of a page are one program."""
    code = "\n".join(blocks(DOCS / "python.md", "python"))
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_a_whole_model_is_built(tmp_path: Path) -> None:
    (tmp_path / "models").symlink_to(ROOT / "models")
    (code,) = blocks(DOCS / "whole-models.md", "python")
    (tmp_path / code.splitlines()[0].removeprefix("# ")).write_text(code)
    (commands,) = blocks(DOCS / "whole-models.md", "sh")
    for line in commands.splitlines():
        run(line, tmp_path)
    manifest = Artifact.open(tmp_path / "out" / "segmenter").manifest
    assert (
        f"{manifest.output.name} {list(manifest.output.shape)}".replace("'", "")
        in (DOCS / "whole-models.md").read_text()
    )


def entries() -> list[str]:
    table = (DOCS / "python.md").read_text().split("## What each command does")[1]
    return re.findall(r"^\| `([\w.]+)`", table, re.MULTILINE)


@pytest.mark.parametrize("entry", entries())
def test_entries_exist(entry: str) -> None:
    module, _, name = entry.rpartition(".")
    assert callable(getattr(importlib.import_module(module), name))


def test_every_page_is_in_the_site() -> None:
    listed = re.findall(r"- ([\w-]+\.md)", (ROOT / "mkdocs.yml").read_text())
    assert sorted(listed) == [page.name for page in sorted(DOCS.glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        assert file.exists(), f"{page.name} links to {target}"
        if anchor:
            titles = re.findall(r"^#+ (.*)$", file.read_text(), re.MULTILINE)
            known = [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles]
            assert anchor in known, f"{page.name} links to {target}"


def test_readme_is_two_screens() -> None:
    text = re.sub(r"^```.*?^```|<!--.*?-->", "", README.read_text(), flags=re.DOTALL | re.MULTILINE)
    assert len(text.split()) <= WORDS


def script(name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(ROOT / "scripts")
    return importlib.import_module(name)


def test_figures_are_those_of_the_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    for path, text in script("measured", monkeypatch).pages().items():
        assert path.read_text() == text, f"python scripts/measured.py writes another {path.name}"


def test_figures_of_trained_weights_are_those_of_the_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT)
    figures = importlib.import_module("scripts.trained_figures")
    remedy = "python -m scripts.trained_figures writes another trained-weights.md"
    assert figures.PAGE.read_text() == figures.page(), remedy


def test_options_are_those_of_the_commands(monkeypatch: pytest.MonkeyPatch) -> None:
    commands = script("commands", monkeypatch)
    assert commands.PAGE.read_text() == commands.text(), "run `python scripts/commands.py`"
