"""Rows of measurements: how a part hands them over, how they are written and shown."""

from __future__ import annotations

import json
import math
import subprocess
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tome_export.runtime import environment as machine

Row = dict[str, Any]
_MARK = "row: "


def emit(benchmark: str, **values: Any) -> None:
    """Hand one row to the process that collects them.

    Args:
        benchmark: What was measured.
        values: Plain numbers, texts, lists and dictionaries. ``passed`` and ``error`` decide about
            the exit status.
    """
    row = plain({"benchmark": benchmark, **values})
    print(_MARK + json.dumps(row, allow_nan=False), flush=True)


def attempt(
    benchmark: str, about: Row, measure: Callable[..., Row | list[Row]], *arguments: object
) -> list[Row]:
    """Emit what a measurement found, or its error: the run goes on either way.

    Args:
        benchmark: As in ``emit``.
        about: Values of every row.
        measure: Returns a row's values, or a list of such.
        *arguments: Of ``measure``.

    Returns:
        The rows that were emitted.
    """
    try:
        found = measure(*arguments)
    except Exception as error:
        if type(error).__name__ == "OutOfMemoryError":
            found = {"skipped": "this GPU's memory is too small"}
        else:
            traceback.print_exc()
            found = {"error": f"{type(error).__name__}: {error}"}
    rows = [{**about, **row} for row in (found if isinstance(found, list) else [found])]
    for row in rows:
        emit(benchmark, **row)
    return rows


def row_from_line(line: str) -> Row | None:
    """A row that ``emit`` printed; None for any other line."""
    if not line.startswith(_MARK):
        return None
    row: Row = json.loads(line.removeprefix(_MARK))
    return row


def plain(value: Any) -> Any:
    """JSON has no infinite and no undefined numbers: they become text."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def failed(row: Row) -> bool:
    """Whether a row makes the run fail."""
    return row.get("passed") is False or "error" in row


def environment(commit: str | None) -> Row:
    """Commit, hardware, driver and versions of this machine; torch is not imported for it.

    Args:
        commit: Of this copy, where it has no git history; else None.
    """
    # Not at the top: a step begins before the packages that it brings are there.
    from benchmarks import harness

    try:
        found = harness.environment()
    # A copy without a history, or no git.
    except (OSError, subprocess.CalledProcessError):
        found = {"commit": None, **dict(machine.environment())}
    timing = "CUDA events around replays of CUDA graphs, variants in turn; medians"
    about: Row = plain(
        {
            **found,
            "commit": commit or found["commit"],
            "clocks": "left as found; read before the first part and after each",
            "state": gpu_state(),
            "timing": timing,
        }
    )
    return about


def gpu_state() -> dict[str, str] | None:
    """Compute capability, clocks in MHz, power limit in W, degrees C of the first GPU, or None."""
    fields = (
        "compute_cap",
        "clocks.sm",
        "clocks.max.sm",
        "clocks.mem",
        "power.limit",
        "temperature.gpu",
    )
    rows = machine.nvidia_smi(f"--query-gpu={','.join(fields)}", "--id=0")
    return dict(zip(fields, rows[0], strict=False)) if rows else None


class Results:
    """The file of rows, written anew with every row so that a run cut short loses nothing.

    Args:
        path: Of the file.
        earlier: A file of rows of other runs, which stay; it need not exist.
    """

    def __init__(self, path: Path, earlier: Path | None = None) -> None:
        self.path = path
        self.environments: dict[str, Row] = {}
        self.rows: list[Row] = []
        if earlier is not None and earlier.exists():
            content = json.loads(earlier.read_text())
            self.environments, self.rows = content["environment"], content["rows"]

    def begin(self, run: str, about: Row, parts: list[str]) -> None:
        """Take rows of one run from now on; earlier rows of its parts go.

        Args:
            run: Name of the run, such as ``step 1``, which each of its rows gets.
            about: Its environment.
            parts: Names of the parts that are run.
        """
        self.rows = [row for row in self.rows if row["part"] not in parts]
        runs = {row["run"] for row in self.rows}
        kept = {name: value for name, value in self.environments.items() if name in runs}
        self.environments = {**kept, run: about}
        self._run = run

    def add(self, part: str, row: Row) -> Row:
        """Take one more row and write the file; gives the row with its run and part."""
        whole = {"run": self._run, "part": part, **row}
        self.rows.append(whole)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        lines = ",\n".join(f"  {json.dumps(item, allow_nan=False)}" for item in self.rows)
        draft = self.path.with_name(f".{self.path.name}.partial")
        head = json.dumps(self.environments, indent=1, allow_nan=False)
        draft.write_text(f'{{"environment": {head},\n "rows": [\n{lines}\n]}}\n')
        draft.replace(self.path)
        return whole

    def done(self) -> set[str]:
        """Names of the parts that ran to their end."""
        return {row["part"] for row in self.rows if row["benchmark"] == "part" and row["done"]}


def text(row: Row) -> str:
    """One line for one row."""
    name = " ".join(
        str(row[key]) for key in ("case", "model", "shape", "layout", "dtype") if row.get(key)
    )
    head = f"{row['part']:14s} {row['benchmark']:12s} {name:40s}"
    if "r" in row:
        head += f" r {row['r']:<3d}"
    if "batch" in row:
        head += f" batch {row['batch']:<4d}"
    return f"{head} {_findings(row)}".rstrip()


def _findings(row: Row) -> str:
    if "error" in row:
        return "ERROR " + str(row["error"]).strip().splitlines()[0][:160]
    if "skipped" in row:
        return f"skipped: {row['skipped']}"
    parts = [] if "passed" not in row else ["pass" if row["passed"] else "FAIL"]
    parts += [f"{count} {name}" for name, count in row.get("tests", {}).items()]
    counts = ("decisions", "disagreements", "explained", "defects", "registers", "local_bytes")
    parts += [f"{key} {row[key]}" for key in counts if key in row]
    numbers = ("gigabytes_per_s", "error_over_eager", "macs_ratio", "wall_s")
    parts += [f"{key} {row[key]:.2f}" for key in numbers if isinstance(row.get(key), float)]
    times = row.get("seconds", {})
    parts += [f"{name} {_us(value):.1f} us" for name, value in times.items()]
    for key in ("share_of_floor", "speedup", "speedup_over_macs_ratio"):
        parts += [f"{key}[{name}] {value:.2f}" for name, value in row.get(key, {}).items()]
    return "; ".join(parts)


def table(rows: list[Row]) -> list[str]:
    """The short table: correctness counted, then the times that the project has targets for."""
    lines = []
    for part in dict.fromkeys(row["part"] for row in rows):
        judged = [row for row in rows if row["part"] == part and "passed" in row]
        if judged:
            passed = sum(row["passed"] for row in judged)
            defects = sum(row.get("defects", 0) for row in judged)
            lines.append(f"{part}: {passed} of {len(judged)} passed, {defects} defects")
    pairs = [row for row in rows if row["benchmark"] == "match+merge" and "seconds" in row]
    if pairs:
        lines.append(
            f"{'match + merge':26s}{'kernels us':>11s}{'eager us':>10s}{'of floor':>9s}"
            f"{'x eager':>8s}"
        )
    for row in pairs:
        times = row["seconds"]
        label = f"{row['shape']} {row['layout']} {row['batch']}"
        lines.append(
            f"{label:26s}{_us(times['kernels']):11.1f}{_us(times['eager']):10.1f}"
            f"{row['share_of_floor']['kernels']:9.2f}{row['speedup']['kernels']:8.1f}"
        )
    models = [row for row in rows if row["benchmark"] == "end to end" and "seconds" in row]
    if models:
        lines.append(
            f"{'model r batch':40s}{'unmerged us':>12s}{'merged us':>10s}{'eager us':>9s}"
            f"{'speed-up':>9s}{'of MACs':>8s}"
        )
    for row in models:
        times, label = row["seconds"], f"{row['model']} {row['r']} {row['batch']}"
        eager = f"{_us(times['eager']):9.0f}" if "eager" in times else " " * 9
        lines.append(
            f"{label:40s}{_us(times['unmerged']):12.0f}{_us(times['merged']):10.0f}{eager}"
            f"{row['speedup']['merged']:9.2f}{row['speedup_over_macs_ratio']['merged']:8.2f}"
        )
    return lines


def _us(seconds: Mapping[str, float]) -> float:
    return seconds["p50"] * 1e6
