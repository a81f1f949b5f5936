"""Artifacts with reports of every command, and a browser to look at their pages."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from results import REPORTS

from tome_export.artifact import Artifact
from tome_export.artifact.files import json_bytes
from tome_export.merge.schedule import Schedule
from tome_export.report.main import ReportRequest, report

BROWSERS = ("chromium", "chromium-browser", "google-chrome")


def parity_with_disagreements(path: Path) -> dict[str, Any]:
    """A real ``parity.json`` of which two decisions differ, one beyond rounding."""
    report: dict[str, Any] = json.loads(path.read_text())
    check = report["checks"][0]
    layer = check["layers"][2]
    within, beyond = 0.4 * layer["margin_bound"], 3 * layer["margin_bound"]
    layer |= {
        "disagreements": 3,
        "defects": 1,
        "largest_margin": beyond,
        "images_diverged": 1,
        "examples": [
            {"image": 1, "token": 4, "kind": "selection", "margin": beyond},
            {"image": 1, "token": 12, "kind": "destination", "margin": within},
        ],
    }
    failure = "layer 2: 1 of 96 merge decisions differ"
    check |= {"passed": False, "failures": [failure], "disagreements": 3, "defects": 1}
    return report


def add(artifact: Path, **reports: dict[str, Any]) -> Path:
    """Add reports, named without their suffix, as the commands do."""
    contents = {f"{name}.json": json_bytes(values) for name, values in reports.items()}
    Artifact.open(artifact).with_files(contents, lambda manifest: manifest)
    return artifact


@pytest.fixture(scope="session")
def built(built_artifact) -> Path:
    """An artifact of vit_digits, fp16, r = 8, with a parity check; not to be changed."""
    return built_artifact(schedule=Schedule(8), precision="fp16").path


@pytest.fixture
def artifact(built, tmp_path) -> Path:
    """A copy of ``built`` that may be changed."""
    return Path(shutil.copytree(built, tmp_path / "artifact"))


@pytest.fixture(scope="session")
def full(built, tmp_path_factory) -> Path:
    """The same with the reports of every command; not to be changed."""
    copy = Path(shutil.copytree(built, tmp_path_factory.mktemp("full") / "digits"))
    made = {name.removesuffix(".json"): make() for name, make in REPORTS.items()}
    return add(copy, parity=parity_with_disagreements(copy / "parity.json"), **made)


@pytest.fixture(scope="session")
def page(full, tmp_path_factory) -> Path:
    """The page with every section."""
    output = tmp_path_factory.mktemp("page") / "full.html"
    report(ReportRequest(full, output=output))
    return output


@dataclass
class OpenedPage:
    """A page in a browser, and what it complained of or asked for."""

    page: Any
    problems: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)


def browser_path() -> str | None:
    """A Chromium that is installed on its own."""
    given = os.environ.get("TOME_EXPORT_CHROMIUM")
    return given or next(filter(None, map(shutil.which, BROWSERS)), None)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A headless browser, closed after the module: while it is open an event loop runs here."""
    path = browser_path()
    if path is None:
        pytest.skip(f"no browser: none of {', '.join(BROWSERS)} is on PATH")
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with playwright.sync_playwright() as started:
        opened = started.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture
def look(browser) -> Iterator[Any]:
    """``look(path, width=, **context)``: open a page and listen to what it does."""
    with contextlib.ExitStack() as stack:

        def opened(path: Path, width: int = 1280, height: int = 900, **options: Any) -> OpenedPage:
            viewport = {"width": width, "height": height}
            context = browser.new_context(viewport=viewport, **options)
            stack.callback(context.close)
            seen = OpenedPage(context.new_page())
            seen.page.on(
                "console",
                lambda m: seen.problems.append(m.text) if m.type in ("error", "warning") else None,
            )
            seen.page.on("pageerror", lambda error: seen.problems.append(str(error)))
            seen.page.on("request", lambda request: seen.requests.append(request.url))
            seen.page.goto(path.as_uri())
            seen.page.wait_for_load_state("load")
            return seen

        yield opened
