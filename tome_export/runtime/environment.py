"""The machine and the libraries that a measurement was made with."""

from __future__ import annotations

import os
import platform
import subprocess
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tome_export.artifact.environment import Environment

PACKAGES = (
    "tome-export",
    "torch",
    "timm",
    "onnx",
    "onnxruntime",
    "onnxruntime-gpu",
    "openvino",
    "tensorrt",
    "tensorrt-rtx",
    "triton",
    "numpy",
)


def environment() -> Environment:
    """Hardware, versions and date, here and now."""
    from tome_export.artifact.environment import Environment

    installed: dict[str, str] = {}
    for found_here in metadata.distributions():  # of two, the first is the one that is imported
        if found_here.name:
            installed.setdefault(found_here.name.lower(), found_here.version)
    found = nvidia_smi("--query-gpu=name,driver_version")
    gpu, driver = found[0] if found else (None, None)
    return Environment(
        cpu=cpu_name(),
        cores=cores(),
        gpu=gpu,
        driver=driver,
        machine=platform.machine(),
        python=platform.python_version(),
        versions={name: installed[name] for name in PACKAGES if name in installed},
        date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
    )


def cpu_name() -> str:
    """The processor's model name as the kernel gives it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def nvidia_smi(*query: str) -> list[list[str]] | None:
    """Rows of a query to NVIDIA's driver as CSV cells; None where there is no working driver."""
    command = ["nvidia-smi", *query, "--format=csv,noheader,nounits"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return None
    return [[cell.strip() for cell in line.split(",")] for line in found.stdout.splitlines()]


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
