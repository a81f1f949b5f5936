"""What of engines can be shown without a GPU: how polygraphy and TensorRT's runtime are set up."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SHIM = Path(__file__).parents[1] / "plugins"

SETUP = """
import os, sys
import tensorrt_rtx
from polygraphy import config, cuda
from tome_export.errors import MissingComponentError
from tome_export.runtime import tensorrt as runner
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
    from tome_export.runtime.tensorrt import _cuda_wheel_folders

    if not _cuda_wheel_folders():
        pytest.skip("no CUDA runtime wheel is installed")
    # In a process of its own: polygraphy chooses its library once.
    command = [sys.executable, "-c", SETUP]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "run the two in separate commands" in done.stdout
    assert len(done.stdout.splitlines()) == 1


LOAD = """
import sys, types
from pathlib import Path
import tensorrt_rtx
from tome_export.errors import InputError
from tome_export.runtime.tensorrt import _load
from tome_export.runtime.runner import EngineFile
made = []
library = types.ModuleType("tensorrt_rtx")
library.__dict__.update(tensorrt_rtx.__dict__)
library.Runtime = lambda logger: made.append(tensorrt_rtx.Runtime(logger)) or made[-1]
for given in ({}, {"version_compatible": True}):
    try:
        with _load(library, EngineFile(Path(sys.argv[1]), **given)):
            pass
    except InputError as error:
        assert "cannot be loaded" in str(error), error
    print(made[-1].engine_host_code_allowed)
"""


def test_code_of_an_engine_may_run_only_if_it_was_built_version_compatible(tmp_path):
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    from tome_export.runtime.tensorrt import _cuda_wheel_folders

    if not _cuda_wheel_folders():
        pytest.skip("no CUDA runtime wheel is installed")
    (tmp_path / "model.engine").write_bytes(b"no engine")
    command = [sys.executable, "-c", LOAD, str(tmp_path / "model.engine")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr, done.stdout) == (0, "", "False\nTrue\n")


TENSORRT = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import tensorrt_shim
try:
    trt = tensorrt_shim.load(Path(sys.argv[2]))
except tensorrt_shim.ShimUnavailable as reason:
    sys.exit(f"skip: {reason}")
switch = trt.Runtime.engine_host_code_allowed
print(switch.fget is not None, switch.fset is not None)
"""


def test_tensorrt_has_the_switch_too(tmp_path):
    """Its real Python layer; a runtime can only be made where TensorRT itself is installed."""
    command = [sys.executable, "-c", TENSORRT, str(SHIM), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.stderr.startswith("skip: "):
        pytest.skip(done.stderr.removeprefix("skip: ").strip())
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, "True True"), done.stderr


REFIT = """
import types
from pathlib import Path
import tensorrt_rtx as trt
from tome_export.engine.messages import collect
from tome_export.errors import InputError
from tome_export.runtime.runner import EngineFile
from tome_export.runtime.tensorrt import _refit
assert trt.OnnxParserRefitter.refit_from_file and trt.Refitter.refit_cuda_engine
file = EngineFile(Path("model.engine"), weights=Path("model.onnx"))
for takes in ((True, True), (True, False), (False, True)):
    asked = []
    library = types.SimpleNamespace(
        Refitter=lambda engine, logger: types.SimpleNamespace(refit_cuda_engine=lambda: takes[1]),
        OnnxParserRefitter=lambda refitter, logger: types.SimpleNamespace(
            refit_from_file=lambda path: asked.append(path) or takes[0]
        ),
    )
    with collect(trt) as (logger, messages):
        try:
            _refit(library, object(), logger, messages, file)
            print("refitted", *asked)
        except InputError as error:
            print(error)
"""


def test_an_engine_without_weights_gets_those_of_its_model_or_is_refused():
    """The library's classes stand in: an engine can only be loaded where there is a GPU."""
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    command = [sys.executable, "-c", REFIT]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    first, *others = done.stdout.splitlines()
    assert first == "refitted model.onnx"
    assert len(others) == 2
    assert all("model.engine does not take the weights of model.onnx" in one for one in others)
