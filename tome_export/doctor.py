"""``tome-export doctor``: what this machine can do, found by trying, and what to install."""

from __future__ import annotations

import importlib
import platform
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from types import ModuleType
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


@dataclass(frozen=True)
class Finding:
    """One thing looked at.

    Attributes:
        name: Of the component or ability.
        ok: Whether it is there and works.
        found: What was found, in one line.
        fix: What to do for it; empty where nothing is to be done.
    """

    name: str
    ok: bool
    found: str
    fix: str = ""


def survey(progress: Progress | None = None) -> list[Finding]:
    """Look at everything a command may need; what is missing is a finding, never an error."""
    progress = progress or Silent()
    progress.stage("Look at the Python packages")
    findings = [
        Finding("tome-export", True, f"{tome_export.__version__}, Python {_python()}"),
        _package("torch", "pip install torch", _torch),
        _package("timm", "pip install timm torchvision"),
        _package("onnx", "pip install onnx"),
        _package("onnxscript", "pip install onnxscript"),
        _package("onnxsim", "pip install onnxsim"),
        _package("onnxruntime", "pip install 'tome-export[cpu]'", _onnxruntime),
        _package("triton", "pip install triton (Linux; needed to compile plugin kernels)"),
    ]
    progress.stage("Look at GPUs and TensorRT")
    report = gpu.detect()
    found = bool(report.gpus)
    findings.append(Finding("GPU", found, report.reason, "" if found else NEEDS_GPU))
    findings += [finding for builder in BUILDERS for finding in _engines(builder)]
    progress.stage("Look at what runs models")
    findings += [_runs(one) for one in registry.BACKENDS.values() if one.opens == "graph"]
    progress.stage("Look at disk and memory")
    return [*findings, _disk(), _memory()]


def _python() -> str:
    return f"{platform.python_version()} on {sys.platform} {platform.machine()}"


def _package(name: str, install: str, more: Callable[[ModuleType], str] | None = None) -> Finding:
    """Import a package: a version number alone would not tell of a broken installation."""
    title = "Triton language" if name == "triton" else name
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name == name:
            return Finding(title, False, "not installed", install)
        return _broken(title, error, install)
    # A package with a part missing or of the wrong build fails with any class while imported.
    except Exception as error:
        return _broken(title, error, install)
    version = str(getattr(module, "__version__", None) or _version(name)).removeprefix("v")
    return Finding(title, True, version + (f", {more(module)}" if more else ""))


def _broken(name: str, error: Exception, install: str) -> Finding:
    reason = " ".join(str(error).split()) or type(error).__name__
    return Finding(name, False, f"installed, but does not load: {reason}", f"repair: {install}")


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "unknown version"


def _torch(torch: Any) -> str:
    cuda = torch.version.cuda
    if cuda is None:
        return "CPU only"
    return f"CUDA {cuda}, {'usable' if torch.cuda.is_available() else 'no usable GPU'}"


def _onnxruntime(onnxruntime: Any) -> str:
    return "providers " + ", ".join(onnxruntime.get_available_providers())


def _engines(builder: EngineBuilder) -> list[Finding]:
    findings = []
    installed = builder.availability()
    for verb, state in (("build", builder.can_build()), ("run", builder.can_run())):
        found, fix = state.reason, "" if state.available else NEEDS_GPU
        if not installed.available:
            # Its reason ends with the command that installs it.
            found, _, fix = installed.reason.rpartition(": ")
        findings.append(Finding(f"{builder.name}: {verb} engines", state.available, found, fix))
    return findings


def _runs(backend: runner.Backend) -> Finding:
    name, reason = f"{backend.name}: run models", backend.missing()
    if reason is None:
        return Finding(name, True, backend.title)
    found, _, fix = reason.rpartition("; ")
    return Finding(name, False, found or reason, fix if found else NEEDS_GPU)


def _disk() -> Finding:
    free = shutil.disk_usage(Path.cwd()).free
    enough = free >= ROOM_BYTES
    found = f"{free / 2**30:.1f} GiB free in the current folder"
    return Finding("disk", enough, found, "" if enough else "free some: a build needs up to 4 GiB")


def _memory() -> Finding:
    available = _available_memory()
    enough = available >= ROOM_BYTES
    found = f"{available / 2**30:.1f} GiB available, {cores()} CPU cores usable"
    fix = "" if enough else "close programs: a build of vit_b16 needs up to 4 GiB"
    return Finding("memory", enough, found, fix)


def _available_memory() -> int:
    """Bytes, by the kernel's estimate; a container's own limit counts where it is lower."""
    available = int(psutil.virtual_memory().available)
    try:
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text())
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
    except (OSError, ValueError):  # no control groups, or "max": no limit
        return available
    return min(available, max(0, limit - used))
