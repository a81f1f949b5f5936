"""Code that comes with an engine may run only where the manifest says that it was built so."""

from __future__ import annotations

import contextlib

import onnx
import pytest
from manifests import engine_values, graph, manifest

from tome_export.artifact import Artifact
from tome_export.bench import memory
from tome_export.engine import Availability
from tome_export.parity.main import _opened
from tome_export.progress import Silent
from tome_export.runtime import tensorrt as polygraphy
from tome_export.runtime.model import model_from_artifact, open_runner
from tome_export.runtime.registry import BACKENDS


class Anything:
    """Runs without doing so."""

    def infer(self, _):
        return {}


@pytest.fixture
def loaded(monkeypatch):
    """How engines were loaded; here there is no GPU to load them on."""
    calls = []

    @contextlib.contextmanager
    def load(_, engine):
        calls.append((engine.path.name, engine.version_compatible))
        yield Anything()

    builder = BACKENDS["tensorrt"].builder
    monkeypatch.setattr(builder, "can_run", lambda: Availability(True, "1", "it can"))
    monkeypatch.setattr(builder, "module", lambda: None)
    monkeypatch.setattr(polygraphy, "_load", load)
    return calls


@pytest.mark.parametrize("compatible", [False, True])
def test_the_manifest_says_whether(tmp_path, loaded, monkeypatch, compatible):
    engine = {**engine_values("model.engine"), "version_compatible": compatible}
    (tmp_path / "model.onnx").write_bytes(graph())
    artifact = Artifact(tmp_path, manifest(engines={"tensorrt": engine}))
    subject = model_from_artifact(artifact, "merged")
    with open_runner("tensorrt", subject, Silent()):
        pass
    with _opened("tensorrt", subject, Silent(), onnx.ModelProto()):
        pass
    # In this process instead of one of its own, through what would be sent there.
    monkeypatch.setattr(memory, "measure", lambda prepare, given, **_: prepare(*given)())
    memory.peak_memory("tensorrt", subject, {}, (8, 3, 8, 8))
    assert loaded == [("model.engine", compatible)] * 3
