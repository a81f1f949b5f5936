"""What ONNX Runtime's sessions are made with."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from tome_export.runtime import ort

onnxruntime = pytest.importorskip("onnxruntime")


def identity() -> onnx.ModelProto:
    helper, float32 = onnx.helper, onnx.TensorProto.FLOAT
    given, got = (helper.make_tensor_value_info(n, float32, ["batch"]) for n in "xy")
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "g", [given], [got])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


@pytest.fixture
def sessions(monkeypatch):
    """The providers and options that real sessions were made with, as ONNX Runtime reads them."""
    from onnxruntime.capi import onnxruntime_inference_collection as collection

    read = collection.check_and_normalize_provider_args
    found = []

    def recorded(providers, options, available):
        found.append(read(providers, options, [*available, "CUDAExecutionProvider"]))
        return read(["CPUExecutionProvider"], None, available)

    monkeypatch.setattr(collection, "check_and_normalize_provider_args", recorded)
    return found


def test_cuda_computes_fp32_in_fp32(sessions, monkeypatch):
    """As far as it goes without a GPU: the provider's options reach the session."""
    monkeypatch.setattr(ort, "missing", lambda _: None)
    with pytest.raises(ort.MissingComponentError, match="could not start CUDAExecutionProvider"):
        ort.OrtRunner(identity(), "cuda")
    names, options = sessions[0]
    assert names == ["CUDAExecutionProvider", "CPUExecutionProvider"]
    assert options == [{"use_tf32": "0"}, {}]


def test_cpu_runs_with_its_provider_alone(sessions):
    with ort.OrtRunner(identity()) as runner:
        assert runner.infer({"x": np.ones(3, np.float32)})["y"].tolist() == [1, 1, 1]
    assert sessions == [(["CPUExecutionProvider"], [{}])]


@pytest.mark.gpu
@pytest.mark.skipif(ort.missing("cuda") is not None, reason="needs onnxruntime-gpu and a GPU")
def test_the_cuda_provider_has_taken_it():
    with ort.OrtRunner(identity(), "cuda") as runner:
        options = runner._session.get_provider_options()["CUDAExecutionProvider"]
    assert options["use_tf32"] == "0"
