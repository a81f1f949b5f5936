"""What every benchmark shares: paired timing, and JSON rows that say where they come from."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from tome_export.runtime import environment as environments
from tome_export.runtime.environment import PACKAGES, cpu_name
from tome_export.runtime.timing import paired, percentiles

__all__ = ["PACKAGES", "RESULTS", "cpu_name", "environment", "paired", "percentiles", "write_rows"]

RESULTS = Path(__file__).parent / "results"


def environment() -> dict[str, Any]:
    """Commit, hardware and library versions, for every file of rows."""
    root = Path(__file__).parents[1]
    git = ["git", "-C", str(root)]
    commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
    dirty = subprocess.run(
        [*git, "status", "--porcelain", "--untracked-files=no"],
        capture_output=True,
        text=True,
        check=True,
    )
    made = commit.stdout.strip() + ("+changes" if dirty.stdout.strip() else "")
    return {"commit": made, **dict(environments.environment())}


def _plain(part: BaseModel) -> Any:
    return part.model_dump(mode="json")


def write_rows(name: str, rows: list[dict[str, Any]]) -> Path:
    """Write rows under their environment to ``benchmarks/results/<name>.json``, a row a line.

    Args:
        name: Of the benchmark.
        rows: Plain values, and parts of an artifact's documents.
    """
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    lines = ",\n".join(f"  {json.dumps(row, default=_plain)}" for row in rows)
    path.write_text(
        f'{{"environment": {json.dumps(environment(), indent=1)},\n "rows": [\n{lines}\n]}}\n'
    )
    return path
