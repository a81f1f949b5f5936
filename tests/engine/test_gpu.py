"""GPU detection against real libraries: none, a wrong one, and whatever this machine has."""

from __future__ import annotations

import ctypes.util
import subprocess
import sys

import pytest

from tome_export.engine import gpu


def test_no_driver_is_said():
    report = gpu.detect_with("libcuda-that-is-not-there.so.1")
    assert report.gpus == ()
    assert report.reason == "no NVIDIA driver here (libcuda-that-is-not-there.so.1 was not found)"


def test_library_that_is_no_driver_is_said():
    name = ctypes.util.find_library("m")
    if name is None:
        pytest.skip("no C maths library to load")
    assert gpu.detect_with(name).reason == f"{name} is not an NVIDIA driver library"


def test_driver_error_is_explained(tmp_path):
    compiler = ctypes.util.find_library("c") and next(
        (c for c in ("cc", "gcc") if subprocess.run(["which", c], capture_output=True).stdout), None
    )
    if not compiler:
        pytest.skip("no C compiler to make a driver library that reports an error")
    library = tmp_path / "libcuda.so.1"
    source = b"int cuInit(unsigned flags) { return 100; }"
    command = [compiler, "-shared", "-fPIC", "-x", "c", "-", "-o", library]
    subprocess.run(command, input=source, check=True)
    report = gpu.detect_with(str(library))
    assert report == gpu.GpuReport(
        (), "no usable GPU: cuInit returned 100: no CUDA device is visible"
    )


def test_this_machine_is_consistent():
    report = gpu.detect()
    assert report is gpu.detect()
    assert report.reason
    for device in report.gpus:
        assert device.name in report.reason
        assert device.compute_capability >= (5, 0)
        assert device.memory_bytes > 1 << 30


def test_needs_no_heavy_import():
    code = (
        "import sys; from tome_export.engine import gpu, select; gpu.detect(); "
        "print(sorted({'torch', 'onnx', 'numpy', 'tensorrt', 'tensorrt_rtx'} & set(sys.modules)))"
    )
    command = [sys.executable, "-c", code]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "[]\n"
