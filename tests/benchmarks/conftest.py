"""Access to the scripts in ``benchmarks``, and a CUDA driver that records its calls."""

from __future__ import annotations

import ctypes
import importlib
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    """Loads a module of ``benchmarks``."""
    monkeypatch.syspath_prepend(ROOT)
    return lambda name: importlib.import_module(f"benchmarks.{name}")


@pytest.fixture
def gpu_bench(bench: Callable[[str], Any]) -> Callable[[str], Any]:
    """Loads a module of ``benchmarks.gpu``."""
    return lambda name: bench(f"gpu.{name}")


@pytest.fixture(scope="session")
def stub_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``libcuda.so.1``, compiled from ``gpu/cuda_driver.c``, in a folder of its own."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler is installed; one makes the driver that records its calls")
    library = tmp_path_factory.mktemp("driver") / "libcuda.so.1"
    source = Path(__file__).parent / "gpu" / "cuda_driver.c"
    options = ["-std=c11", "-O1", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"]
    command = [compiler, *options, "-Wl,-soname,libcuda.so.1", "-o", library, source, "-ldl"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return library


Call = tuple[str, dict[str, Any]]


class StubDriver:
    """What a test sets in the recording driver and reads from it.

    Attributes:
        path: Of the library.
    """

    def __init__(self, path: Path) -> None:
        self.path = str(path)
        self._library = ctypes.CDLL(self.path)
        self._library.stub_record.restype = ctypes.c_char_p

    def reset(self) -> None:
        """Forget all calls and settings."""
        self._library.stub_reset()

    def without_context(self) -> None:
        """No CUDA context is current."""
        self._library.stub_without_context()

    def expect_parameters(self, sizes: Sequence[int]) -> None:
        """How many bytes the kernel reads of each parameter."""
        self._library.stub_parameters(len(sizes), (ctypes.c_uint * len(sizes))(*sizes))

    def fail(self, function: str, status: int, log: str = "") -> None:
        """Let a function return an error; the log is what the driver's compiler says."""
        self._library.stub_fail(function.encode(), status, log.encode())

    def calls(self) -> list[Call]:
        """Each call so far: the function and its arguments; those given in bytes are lists of them.

        ``image`` is one of bytes; ``parameter`` has one per parameter.
        """
        found: list[Call] = []
        for line in self._library.stub_record().decode().splitlines():
            name, *words = line.split(" ")
            arguments: dict[str, Any] = {"parameter": []}
            for word in words:
                key, _, value = word.partition("=")
                if key == "parameter":
                    arguments["parameter"].append(bytes.fromhex(value))
                else:
                    arguments[key] = bytes.fromhex(value) if key == "image" else value
            found.append((name, arguments))
        return found

    def named(self, function: str) -> list[dict[str, Any]]:
        """Arguments of each call of one function."""
        return [arguments for name, arguments in self.calls() if name == function]


@pytest.fixture
def stub(stub_library: Path) -> StubDriver:
    """The recording driver, with nothing recorded yet."""
    driver = StubDriver(stub_library)
    driver.reset()
    return driver


@pytest.fixture(scope="session")
def thinned_onnxruntime() -> tuple[Path, Path]:
    """The thinned onnxruntime-gpu for this Python, and a folder with cuRAND, which torch lacks.

    ``make`` puts both beside the environment; where it did not, they are made here, once.
    """
    from filelock import FileLock

    shared = Path(sys.prefix) / "share" / "tome-export"
    shared.mkdir(parents=True, exist_ok=True)
    tree, curand = shared / "onnxruntime-gpu", shared / "curand"
    script = ROOT / "scripts" / "thin_onnxruntime_gpu.py"
    version = runpy.run_path(str(script))["VERSION"]
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--only-binary=:all:"]
    makers = {
        tree / f"onnxruntime_gpu-{version}.dist-info": [sys.executable, str(script), str(tree)],
        curand: [*pip, "--target", str(curand), "nvidia-curand==10.*"],
    }
    with FileLock(shared / ".lock"):
        for made, command in makers.items():
            if made.exists():
                continue
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode != 0:
                last = (done.stderr.strip().splitlines() or ["it gave no reason"])[-1]
                pytest.skip(f"{made.name} cannot be had here: {last}")
    return tree, curand
