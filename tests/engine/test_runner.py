"""What of the runner can be shown without a GPU: how polygraphy is set up."""

from __future__ import annotations

import subprocess
import sys

import pytest

SETUP = """
import os, sys
import tensorrt_rtx
from polygraphy import config, cuda
from tome_export.engine import runner
from tome_export.errors import MissingComponentError
before = dict(os.environ)
runner._prepare_polygraphy(tensorrt_rtx)
assert dict(os.environ) == before
from polygraphy.backend.trt import TrtRunner
import polygraphy.backend.trt.runner as module
assert module.trt.Builder is tensorrt_rtx.Builder, module.trt
assert cuda.wrapper().handle.cudaGetDeviceCount is not None
other = type(sys)("tensorrt")
try:
    runner._prepare_polygraphy(other)
except MissingComponentError as error:
    print(error)
"""


def test_polygraphy_takes_tensorrt_rtx_and_the_cuda_runtime_of_the_wheels():
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    from tome_export.engine.runner import _cuda_wheel_folders

    if not _cuda_wheel_folders():
        pytest.skip("no CUDA runtime wheel is installed")
    # In a process of its own: polygraphy chooses its library once.
    command = [sys.executable, "-c", SETUP]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "run the two in separate commands" in done.stdout
    assert len(done.stdout.splitlines()) == 1
