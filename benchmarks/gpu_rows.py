"""Rows of the GPU benchmark: how a part hands them over, how they are written and shown."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import traceback
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import harness

Row = dict[str, Any]
_MARK = "row: "


def emit(part: str, benchmark: str, **values: Any) -> None:
    """Hand one row to the process that collects them.

    Args:
        part: ``check``, ``aot``, ``ops``, ``models`` or ``runtimes``.
        benchmark: What was measured.
        values: Plain numbers, texts, lists and dictionaries. ``passed`` and ``error`` decide about
            the exit status.
    """
    row = plain({"part": part, "benchmark": benchmark, **values})
    print(_MARK + json.dumps(row, allow_nan=False), flush=True)


def attempt(
    part: str,
    benchmark: str,
    about: Row,
    measure: Callable[..., Row | list[Row]],
    *arguments: object,
) -> None:
    """Emit what a measurement found, or its error: the run goes on either way.

    Args:
        part: As in ``emit``.
        benchmark: As in ``emit``.
        about: Values of every row.
        measure: Returns a row's values, or a list of such.
        *arguments: Of ``measure``.
    """
    try:
        found = measure(*arguments)
    except Exception as error:
        if type(error).__name__ == "OutOfMemoryError":
            found = {"skipped": "this GPU's memory is too small"}
        else:
            traceback.print_exc()
            found = {"error": f"{type(error).__name__}: {error}"}
    for row in found if isinstance(found, list) else [found]:
        emit(part, benchmark, **{**about, **row})


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
    """Commit, GPU, driver and versions of this machine.

    Args:
        commit: Of this copy, where it has no git history; else None.
    """
    import torch

    try:
        found = harness.environment()
    # A copy without a history, or no git.
    except (OSError, subprocess.CalledProcessError):
        found = {"commit": None, "cpu": harness.cpu_name()}
    device = torch.cuda.get_device_properties(0)
    versions = {d.name: d.version for d in metadata.distributions() if d.name}
    wanted = (*harness.PACKAGES, "triton", "onnxruntime-gpu")
    smi = nvidia_smi()
    about: Row = plain(
        {
            **found,
            "commit": commit or found["commit"],
            "gpu": device.name,
            "compute_capability": f"{device.major}.{device.minor}",
            "multiprocessors": device.multi_processor_count,
            "memory_bytes": device.total_memory,
            "l2_bytes": getattr(device, "L2_cache_size", None),
            "driver": (smi or {}).get("driver_version"),
            "cuda_of_torch": torch.version.cuda,
            "nvidia_smi": smi,
            "clocks": "left as found; nvidia_smi read before the first part and after each",
            "timing": "CUDA events around replays of CUDA graphs, variants in turn; medians",
            "versions": {name: versions[name] for name in wanted if name in versions},
        }
    )
    return about


def nvidia_smi() -> dict[str, str] | None:
    """Driver, clocks and power limit of the first GPU as nvidia-smi reads them, or None."""
    fields = (
        "name",
        "driver_version",
        "clocks.sm",
        "clocks.max.sm",
        "clocks.mem",
        "power.limit",
        "temperature.gpu",
    )
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    command = [tool, f"--query-gpu={','.join(fields)}", "--format=csv,noheader", "--id=0"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return None
    values = [value.strip() for value in answer.stdout.splitlines()[0].split(",")]
    return dict(zip(fields, values, strict=False))


class Results:
    """The file of rows, written anew with every row so that a run cut short loses nothing."""

    def __init__(self, path: Path, about: Row) -> None:
        self.path = path
        self.about = about
        self.rows: list[Row] = []

    def add(self, row: Row) -> None:
        """Take one more row and write the file."""
        self.rows.append(row)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        lines = ",\n".join(f"  {json.dumps(item, allow_nan=False)}" for item in self.rows)
        draft = self.path.with_name(f".{self.path.name}.partial")
        head = json.dumps(self.about, indent=1, allow_nan=False)
        draft.write_text(f'{{"environment": {head},\n "rows": [\n{lines}\n]}}\n')
        draft.replace(self.path)


def text(row: Row) -> str:
    """One line of the table."""
    name = " ".join(
        str(row[key]) for key in ("case", "model", "shape", "layout", "dtype") if row.get(key)
    )
    head = f"{row['part']:8s} {row['benchmark']:16s} {name:42s}"
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
    counts = ("decisions", "disagreements", "explained", "defects", "differing")
    parts += [f"{key} {row[key]}" for key in counts if key in row]
    numbers = ("gigabytes_per_s", "error_over_eager", "macs_ratio")
    parts += [f"{key} {row[key]:.2f}" for key in numbers if isinstance(row.get(key), float)]
    times = row.get("seconds", {})
    parts += [f"{name} {value['p50'] * 1e6:.1f} us" for name, value in times.items()]
    for key in ("share_of_floor", "speedup", "speedup_over_macs_ratio"):
        parts += [f"{key}[{name}] {value:.2f}" for name, value in row.get(key, {}).items()]
    return "; ".join(parts)


def table(rows: list[Row]) -> list[str]:
    """The short table: correctness counted, then the times that the project has targets for."""
    lines = []
    for part in ("check", "aot"):
        judged = [row for row in rows if row["part"] == part and "passed" in row]
        if judged:
            passed = sum(row["passed"] for row in judged)
            defects = sum(row.get("defects", 0) for row in judged)
            lines.append(f"{part}: {passed} of {len(judged)} passed, {defects} defects")
    pairs = [row for row in rows if row["benchmark"] == "match+merge" and "seconds" in row]
    if pairs:
        lines.append(
            f"{'match + merge':26s}{'kernels us':>11s}{'ieee us':>9s}{'eager us':>10s}"
            f"{'of floor':>9s}{'x eager':>8s}"
        )
    for row in pairs:
        name, times = "kernel tf32x3", row["seconds"]
        label = f"{row['shape']} {row['layout']} {row['batch']}"
        lines.append(
            f"{label:26s}{_us(times[name]):11.1f}{_us(times['kernel ieee']):9.1f}"
            f"{_us(times['eager']):10.1f}{row['share_of_floor'][name]:9.2f}"
            f"{row['speedup'][name]:8.1f}"
        )
    models = [row for row in rows if row["benchmark"] == "end to end" and "seconds" in row]
    if models:
        lines.append(
            f"{'model r batch':34s}{'unmerged us':>12s}{'kernels us':>11s}{'eager us':>10s}"
            f"{'speed-up':>9s}{'of MACs':>8s}"
        )
    for row in models:
        times, label = row["seconds"], f"{row['model']} {row['r']} {row['batch']}"
        lines.append(
            f"{label:34s}{_us(times['unmerged']):12.0f}{_us(times['kernels']):11.0f}"
            f"{_us(times['eager']):10.0f}{row['speedup']['kernels']:9.2f}"
            f"{row['speedup_over_macs_ratio']['kernels']:8.2f}"
        )
    return lines


def _us(seconds: Mapping[str, float]) -> float:
    return seconds["p50"] * 1e6
