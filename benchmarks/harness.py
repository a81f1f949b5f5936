"""What every benchmark shares: paired timing, and JSON rows that say where they come from."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import time
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "timm", "onnx", "onnxruntime", "triton", "tensorrt-rtx", "tensorrt", "numpy")


def environment() -> dict[str, Any]:
    """Commit, hardware and library versions, for every file of rows."""
    installed = {d.name: d.version for d in metadata.distributions() if d.name}
    root = Path(__file__).parents[1]
    git = ["git", "-C", str(root)]
    commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
    dirty = subprocess.run(
        [*git, "status", "--porcelain", "--untracked-files=no"],
        capture_output=True,
        text=True,
        check=True,
    )
    return {
        "commit": commit.stdout.strip() + ("+changes" if dirty.stdout.strip() else ""),
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "gpu": None,
        "driver": None,
        "versions": {name: installed[name] for name in PACKAGES if name in installed},
    }


def cpu_name() -> str:
    """The processor's model name as the kernel gives it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def paired(
    runs: Mapping[str, Callable[[], object]], repeats: int, warmup: int = 2
) -> dict[str, np.ndarray[Any, Any]]:
    """Time several things in turn, so that a drift of the machine's speed meets them all.

    Returns:
        Seconds by name, ``[repeats]``; entry i of each was measured in the same round.
    """
    for _ in range(warmup):
        for run in runs.values():
            run()
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    return {name: np.array(values) for name, values in seconds.items()}


def percentiles(values: np.ndarray[Any, Any]) -> dict[str, float]:
    """p20, p50 and p80."""
    return {f"p{p}": float(np.percentile(values, p)) for p in (20, 50, 80)}


def write_rows(name: str, rows: list[dict[str, Any]]) -> Path:
    """Write rows under their environment to ``benchmarks/results/<name>.json``, a row a line."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    lines = ",\n".join(f"  {json.dumps(row)}" for row in rows)
    path.write_text(
        f'{{"environment": {json.dumps(environment(), indent=1)},\n "rows": [\n{lines}\n]}}\n'
    )
    return path
