"""``tome-export doctor``: what this machine can do, found by trying, and what to install."""

from __future__ import annotations

import importlib
import platform
import shutil
import sys
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

import tome_export
from tome_export.engine import BUILDERS, gpu
from tome_export.progress import Progress, Silent
from tome_export.runtime import registry
from tome_export.runtime.environment import cores

if TYPE_CHECKING:
    from tome_export.engine import EngineBuilder
    from tome_export.runtime import runner

ROOM_BYTES = 4 << 30
"""Free memory and disk below which a build of vit_b16 may fail."""

NEEDS_GPU = "use a machine with an NVIDIA GPU and its driver"

PACKAGES = {
    "torch": "pip install torch",
    "timm": "pip install timm torchvision",
    "onnx": "pip install onnx",
    "onnxscript": "pip install onnxscript",
    "onnxsim": "pip install onnxsim",
    "onnxruntime": "pip install 'tome-export[cpu]'",
    "triton": "pip install triton (Linux; needed to compile plugin kernels)",
}
"""Packages that are tried, and how to install them."""


@dataclass(frozen=True)
class Finding:
    """A component or ability that was looked at.

    Attributes:
        fix: What to do for it; empty where nothing is to be done.
    """

    name: str
    ok: bool
    found: str
    fix: str


def survey(progress: Progress | None = None) -> list[Finding]:
    """Look at everything a command may need; what is missing is a finding, never an error."""
    progress = progress or Silent()
    progress.stage("Look at the Python packages")
    python = f"{platform.python_version()} on {sys.platform} {platform.machine()}"
    findings = [_finding("tome-export", f"{tome_export.__version__}, Python {python}")]
    findings += [_package(name, install) for name, install in PACKAGES.items()]
    progress.stage("Look at GPUs and TensorRT")
    report = gpu.detect()
    findings.append(_finding("GPU", report.reason, "" if report.gpus else NEEDS_GPU))
    findings += [finding for builder in BUILDERS for finding in _engines(builder)]
    progress.stage("Look at what runs models")
    findings += [_runs(one) for one in registry.BACKENDS.values() if one.opens == "graph"]
    progress.stage("Look at disk and memory")
    free, available = shutil.disk_usage(Path.cwd()).free, _available_memory()
    disk = "" if free >= ROOM_BYTES else "free some: a build needs up to 4 GiB"
    memory = "close programs: a build of vit_b16 needs up to 4 GiB"
    return [
        *findings,
        _finding("disk", f"{free / 2**30:.1f} GiB free in the current folder", disk),
        _finding(
            "memory",
            f"{available / 2**30:.1f} GiB available, {cores()} CPU cores usable",
            "" if available >= ROOM_BYTES else memory,
        ),
    ]


def _finding(name: str, found: str, fix: str = "") -> Finding:
    """What needs no fix works."""
    return Finding(name, not fix, found, fix)


def _package(name: str, install: str) -> Finding:
    """Import a package: a version number alone would not tell of a broken installation."""
    title = "Triton language" if name == "triton" else name
    try:
        module = importlib.import_module(name)
    # A package with a part missing or of the wrong build fails with any class while imported.
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and error.name == name:
            return _finding(title, "not installed", install)
        reason = " ".join(str(error).split()) or type(error).__name__
        return _finding(title, f"installed, but does not load: {reason}", f"repair: {install}")
    return _finding(title, _version(module, name) + _abilities(module, name))


def _version(module: Any, name: str) -> str:
    try:
        version = getattr(module, "__version__", None) or metadata.version(name)
    except metadata.PackageNotFoundError:
        return "unknown version"
    return str(version).removeprefix("v")


def _abilities(module: Any, name: str) -> str:
    if name == "onnxruntime":
        return ", providers " + ", ".join(module.get_available_providers())
    if name != "torch":
        return ""
    if module.version.cuda is None:
        return ", CPU only"
    usable = "usable" if module.cuda.is_available() else "no usable GPU"
    return f", CUDA {module.version.cuda}, {usable}"


def _engines(builder: EngineBuilder) -> list[Finding]:
    findings = []
    installed = builder.availability()
    for verb, state in (("build", builder.can_build()), ("run", builder.can_run())):
        found, fix = state.reason, "" if state.available else NEEDS_GPU
        if not installed.available:
            # Its reason ends with the command that installs it.
            found, _, fix = installed.reason.rpartition(": ")
        findings.append(_finding(f"{builder.name}: {verb} engines", found, fix))
    return findings


def _runs(backend: runner.Backend) -> Finding:
    name, reason = f"{backend.name}: run models", backend.missing()
    if reason is None:
        return _finding(name, backend.title)
    found, _, fix = reason.rpartition("; ")
    return _finding(name, found or reason, fix if found else NEEDS_GPU)


def _available_memory() -> int:
    """Bytes, by the kernel's estimate; a container's own limit counts where it is lower."""
    available = int(psutil.virtual_memory().available)
    try:
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text())
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
    except (OSError, ValueError):  # no control groups, or "max": no limit
        return available
    return min(available, max(0, limit - used))
