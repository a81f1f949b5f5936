"""Which backend is chosen, on machines that have and lack each part."""

from __future__ import annotations

import sys

import pytest

from tome_export.engine import gpu, select
from tome_export.engine.tensorrt import TensorRT
from tome_export.engine.tensorrt_rtx import TensorRTRTX
from tome_export.errors import MissingComponentError, UsageError

MODULES = {"tensorrt": "10.14.1", "tensorrt_rtx": "1.7.1"}
ONE_GPU = gpu.GpuReport((gpu.Gpu(0, "NVIDIA H200", (9, 0), 139 << 30),), "NVIDIA H200")
NO_GPU = gpu.GpuReport((), "no NVIDIA driver here")


@pytest.fixture
def machine(monkeypatch):
    """Puts packages of given versions, and a GPU or none, on this machine; None removes one."""

    def arrange(has_gpu: bool, **versions: str | None) -> None:
        monkeypatch.setattr(gpu, "detect", lambda: ONE_GPU if has_gpu else NO_GPU)
        for name in MODULES:
            version = versions.get(name)
            module = None if version is None else type(sys)(name)
            if module is not None:
                module.__version__ = version
            monkeypatch.setitem(sys.modules, name, module)

    return arrange


@pytest.mark.parametrize(
    ("has_gpu", "packages", "expected"),
    [
        (True, ("tensorrt", "tensorrt_rtx"), "tensorrt"),
        (True, ("tensorrt",), "tensorrt"),
        (True, ("tensorrt_rtx",), "tensorrt-rtx"),
        (False, ("tensorrt", "tensorrt_rtx"), "tensorrt-rtx"),
        (False, ("tensorrt_rtx",), "tensorrt-rtx"),
        (False, ("tensorrt",), None),
        (True, (), None),
    ],
)
def test_auto(machine, has_gpu, packages, expected):
    machine(has_gpu, **{name: MODULES[name] for name in packages})
    selection = select("auto")
    assert (selection.builder and selection.builder.name) == expected
    if expected is None:
        assert selection.line.startswith("no engine is built: ")
        assert "pip install tensorrt-rtx" in selection.line
    assert "\n" not in selection.line


def test_auto_says_why_not_the_better_one(machine):
    machine(False, **MODULES)
    assert select().line == (
        "TensorRT-RTX 1.7.1 builds the engine; TensorRT 10.14.1 needs an NVIDIA GPU to build an "
        "engine: no NVIDIA driver here"
    )


@pytest.mark.parametrize(
    ("choice", "has_gpu", "versions", "message"),
    [
        ("tensorrt", True, {}, "TensorRT is not installed: pip install tensorrt"),
        ("tensorrt-rtx", True, {}, "TensorRT-RTX is not installed: pip install tensorrt-rtx"),
        ("tensorrt", False, {"tensorrt": "11.4.0.106"}, "needs an NVIDIA GPU to build an engine"),
        ("tensorrt", True, {"tensorrt": "10.7.0"}, r"TensorRT 10\.7\.0 is older than 10\.13"),
        ("tensorrt-rtx", False, {"tensorrt_rtx": "1.1.0"}, r"1\.1\.0 is older than 1\.2"),
    ],
)
def test_named_backend_that_cannot_build(machine, choice, has_gpu, versions, message):
    machine(has_gpu, **versions)
    with pytest.raises(MissingComponentError, match=message) as failure:
        select(choice)
    assert failure.value.exit_code == 4


def test_library_that_does_not_load(tmp_path, monkeypatch):
    (tmp_path / "tensorrt.py").write_text("raise OSError('libnvinfer.so.11: cannot open')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "tensorrt", raising=False)
    found = TensorRT().availability()
    assert not found.available
    assert "libnvinfer.so.11" in found.reason
    assert found.reason.endswith("pip install tensorrt")


def test_none_and_unknown():
    assert select("none").builder is None
    with pytest.raises(UsageError, match="expected one of auto, tensorrt, tensorrt-rtx, none"):
        select("trt")


def test_real_tensorrt_rtx_is_found():
    module = pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    found = TensorRTRTX().can_build()
    assert (found.available, found.version) == (True, module.__version__)
