"""Code that comes with an engine may run only where the manifest says that it was built so."""

from __future__ import annotations

import contextlib

import onnx
import pytest

from tome_export.artifact import Artifact
from tome_export.engine.tensorrt import TensorRT
from tome_export.pipeline import bench_memory
from tome_export.pipeline.backends import open_runner, subject_of
from tome_export.pipeline.engine_parity import EngineRunnerFactory
from tome_export.progress import Silent


@pytest.fixture
def loaded(monkeypatch):
    """How engines were loaded; here there is no GPU to load them on."""
    calls = []

    @contextlib.contextmanager
    def runner(self, path, **options):
        calls.append((path.name, options))
        yield self

    monkeypatch.setattr(TensorRT, "runner", runner)
    return calls


@pytest.mark.parametrize("compatible", [False, True])
def test_the_manifest_says_whether(tmp_path, loaded, monkeypatch, compatible):
    engine = {"file": "model.engine", "batch": "8", "version_compatible": compatible}
    manifest = {
        "precision": "fp16",
        "output": {"name": "logits"},
        "batch": "8",
        "engines": {"tensorrt": engine},
        "merge": {"merge_op": "matmul", "r": [1]},
        "inputs": [],
    }
    artifact = Artifact(tmp_path, manifest)
    subject = subject_of(artifact, "merged")
    with open_runner("tensorrt", subject, Silent()):
        pass
    with EngineRunnerFactory(artifact, "tensorrt", Silent())(onnx.ModelProto()):
        pass
    monkeypatch.setattr(bench_memory, "measure", lambda *given, **_: given[1])
    request = bench_memory.peak_memory("tensorrt", subject, 8, [3, 8, 8], tmp_path)
    options = {"version_compatible": request["version_compatible"]}
    bench_memory._opener("tensorrt", tmp_path / "model.engine", "logits", **options)()
    assert loaded == [("model.engine", {"version_compatible": compatible})] * 3
    while bench_memory._OPEN:
        bench_memory._OPEN.pop().__exit__(None, None, None)
