"""What is OpenVINO's own: float32 whatever it would choose itself, and errors in one line."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest

from tome_export.errors import ExportError, InputError
from tome_export.runtime.openvino import OpenVino
from tome_export.runtime.runner import Runnable

openvino = pytest.importorskip("openvino")


def graph(operator="Identity", domain=""):
    helper, float32 = onnx.helper, onnx.TensorProto.FLOAT
    given, got = (helper.make_tensor_value_info(n, float32, ["batch"]) for n in "xy")
    node = helper.make_node(operator, ["x"], ["y"], domain=domain)
    imports = [helper.make_opsetid("", 17), helper.make_opsetid("elsewhere", 1)]
    model = helper.make_graph([node], "g", [given], [got])
    return helper.make_model(model, opset_imports=imports, ir_version=8)


def runnable(model):
    return Runnable(label="it", precision="fp32", output_name="y", graph=model)


def test_it_computes_in_float32(monkeypatch):
    """By default it computes in bfloat16 where the CPU has that, as no test on another one sees."""
    compiled = []
    compile_model = openvino.Core.compile_model

    def recorded(*given):
        compiled.append(compile_model(*given))
        return compiled[-1]

    monkeypatch.setattr(openvino.Core, "compile_model", recorded)
    with OpenVino().open(runnable(graph())) as runner:
        assert runner.infer({"x": np.ones(3, np.float32)})["y"].tolist() == [1, 1, 1]
    (model,) = compiled
    assert model.get_property("INFERENCE_PRECISION_HINT") == openvino.Type.f32
    assert str(model.get_property("EXECUTION_MODE_HINT")).endswith("ACCURACY")
    assert str(model.get_property("PERFORMANCE_HINT")).endswith("LATENCY")


def test_a_graph_that_it_refuses():
    with (
        pytest.raises(ExportError) as raised,
        OpenVino().open(runnable(graph("Nowhere", "elsewhere"))),
    ):
        pass
    assert str(raised.value) == (
        f"openvino {openvino.__version__.partition('-')[0]} has no operators elsewhere.Nowhere; "
        "build the artifact with --merge-op matmul, which has standard ones"
    )
    damaged = graph("Gather")
    with (
        pytest.raises(ExportError, match=r"^openvino \S+ cannot load the model: ") as raised,
        OpenVino().open(runnable(damaged)),
    ):
        pass
    assert "\n" not in str(raised.value)


def test_inputs_that_do_not_fit():
    with OpenVino().open(runnable(graph())) as runner:
        with pytest.raises(InputError, match=r"^inputs are \['z'\]; the model takes \['x'\]$"):
            runner.infer({"z": np.ones(3, np.float32)})
        with pytest.raises(ExportError, match=r"^openvino failed to run the model: "):
            runner.infer({"x": np.ones((3, 2), np.float32)})


SIGNAL_AFTER_TWO = """
import gc, signal
from test_openvino import OpenVino, graph, runnable

first, second = (OpenVino().open(runnable(graph())) for _ in range(2))
for one in (first, second):
    one.__enter__()
for one in (first, second):
    one.__exit__(None, None, None)
gc.collect()
try:
    signal.raise_signal(signal.SIGINT)
except KeyboardInterrupt:
    print("interrupted")
"""


@pytest.mark.skipif(sys.platform == "win32", reason="sends POSIX signals")
def test_ctrl_c_after_two_models():
    """It was a segmentation fault: the second put back the stack for signals of the first."""
    here = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    command = [sys.executable, "-c", SIGNAL_AFTER_TWO]
    ran = subprocess.run(command, env=here, capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stdout) == (0, "interrupted\n"), ran.stderr
