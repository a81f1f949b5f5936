"""TensorRT-RTX's plugin provider, registered for real where its package is at hand."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from tome_export.engine import gpu
from tome_export.errors import MissingComponentError
from tome_export.runtime import ort_rtx
from tome_export.runtime.registry import BACKENDS
from tome_export.runtime.runner import Runnable

BACKEND = BACKENDS["ort-rtx"]
BESIDE = Path(sys.prefix) / "share" / "tome-export" / "ort-rtx"
"""Where ``make test`` puts the package: not in the environment, of which it is no part."""

FOLDERS = [
    Path(folder)
    for spec in [importlib.util.find_spec(ort_rtx.PACKAGE)]
    for folder in (spec.submodule_search_locations if spec else [BESIDE / ort_rtx.PACKAGE])
]
needs_package = pytest.mark.skipif(
    not FOLDERS[0].is_dir(), reason=f"{ort_rtx.DISTRIBUTION} is not installed"
)
needs_no_gpu = pytest.mark.skipif(bool(gpu.detect().gpus), reason="there is a GPU")


@pytest.mark.skipif(importlib.util.find_spec(ort_rtx.PACKAGE) is not None, reason="it is installed")
def test_without_the_package():
    reason = BACKEND.missing()
    assert reason == (
        "onnxruntime-ep-nv-tensorrt-rtx is not installed; install tome-export[cpu,ort-rtx] on a "
        "machine with an NVIDIA RTX GPU"
    )
    with pytest.raises(MissingComponentError, match="is not installed"):
        BACKEND.open(Runnable(label="it", precision="fp32", output_name="y"))


REGISTER = """
import ctypes, sys
sys.path.append(sys.argv[1])
for library in sys.argv[2:]:
    ctypes.CDLL(library, mode=ctypes.RTLD_GLOBAL)
from tome_export.errors import MissingComponentError
from tome_export.runtime import ort_rtx
print(ort_rtx.OrtRtx().missing())
try:
    ort_rtx.devices()
except MissingComponentError as error:
    print(error)
import onnxruntime
try:
    onnxruntime.unregister_execution_provider_library("NvTensorRTRTXExecutionProvider")
    print("was registered")
except Exception:
    print("was not registered")
"""


def registered(*drivers):
    """What a process that registers it says: importing it changes the process for good."""
    command = [sys.executable, "-c", REGISTER, str(FOLDERS[0].parent), *map(str, drivers)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@needs_package
@needs_no_gpu
def test_without_a_driver():
    missing, error, state = registered()
    assert missing == f"{ort_rtx.DISTRIBUTION} needs an NVIDIA RTX GPU: {gpu.detect().reason}"
    assert "cannot load onnxruntime-ep-nv-tensorrt-rtx" in error
    assert "libcuda.so.1" in error
    assert state == "was not registered"


@needs_package
@needs_no_gpu
def test_the_real_library_is_registered(tmp_path):
    """With a driver library that finds no GPU, as on a machine whose GPU is hidden."""
    tools = ("cc", "nm")
    if any(subprocess.run(["which", tool], capture_output=True).returncode for tool in tools):
        pytest.skip("no C compiler and binutils to make such a driver library")
    provider = FOLDERS[0] / "libonnxruntime_providers_nv_tensorrt_rtx.so"
    listed = subprocess.run(
        ["nm", "-D", "--undefined-only", provider], capture_output=True, text=True, check=True
    )
    names = [line.split()[-1] for line in listed.stdout.splitlines()]
    libraries = []
    for library, prefix in (("libcuda.so.1", "cu"), ("libnvidia-ml.so.1", "nvml")):
        needed = [n for n in names if n.startswith(prefix) and n.isidentifier()]
        source = "".join(f"int {name}(void) {{ return 100; }}\n" for name in needed)
        libraries.append(tmp_path / library)
        command = ["cc", "-shared", "-fPIC", "-x", "c", f"-Wl,-soname,{library}", "-o"]
        subprocess.run([*command, libraries[-1], "-"], input=source, text=True, check=True)
    _, error, state = registered(*libraries)
    assert error.endswith(
        "takes none of the GPUs here; expected an NVIDIA RTX GPU of the Ampere generation or later"
    )
    assert state == "was registered"
