"""What a server is started with, as the models of a repository want it."""

from __future__ import annotations

import shlex
from types import SimpleNamespace

import pytest

from tome_export.errors import TomeExportError
from tome_export.pipeline import server as servers
from tome_export.pipeline.serve import ServeRequest, serve
from tome_export.pipeline.server import RunRequest, running
from tome_export.serve.kserve import KServeOptions, kserve_manifest
from tome_export.serve.launch import Launch, launch_of
from tome_export.serve.process import GroupProcess

pytest.importorskip("tritonclient.grpc", reason="the serve extra is not installed")

FLAG = "--backend-config=tensorrt,version-compatible=true"
ENGINE = {"engines": {"tensorrt": "1:4:8"}}


@pytest.mark.parametrize(
    ("artifact", "arguments", "environment"),
    [
        (ENGINE, (), {}),
        ({**ENGINE, "version_compatible": True}, (FLAG,), {}),
        ({"batch": "4", "engines": {"tensorrt": "4"}, "version_compatible": True}, (FLAG,), {}),
        ({}, (), {"NVIDIA_TF32_OVERRIDE": "0"}),
        ({"merge_op": "index_add"}, (), {}),
    ],
)
def test_launch(make_artifact, tmp_path, artifact, arguments, environment):
    repository = tmp_path / "a repository"
    done = serve(ServeRequest((make_artifact(**artifact),), repository))
    assert done.launch == launch_of(repository) == Launch(arguments, environment)
    manifest = kserve_manifest("m", KServeOptions(), done.launch)
    model = manifest["spec"]["predictor"]["model"]
    assert (FLAG in model["args"]) == bool(arguments)
    assert model.get("env", []) == [{"name": n, "value": v} for n, v in environment.items()]
    assert shlex.split(done.launch.command(repository)) == [
        *(f"{name}={value}" for name, value in environment.items()),
        *("tritonserver", f"--model-repository={repository}", *arguments),
    ]


@pytest.mark.usefixtures("installation")
def test_a_server_is_started_with_it(make_artifact, tmp_path, monkeypatch):
    """Engines cannot be loaded here: the server ends by itself, for that reason."""
    repository = tmp_path / "repository"
    for name, artifact in {"engine": {**ENGINE, "version_compatible": True}, "onnx": {}}.items():
        serve(ServeRequest((make_artifact(model=name, **artifact),), repository))
    started = []
    launch = GroupProcess.launch

    def spy(self, arguments, environment):
        started.append((list(arguments), dict(environment)))
        launch(self, arguments, environment)

    monkeypatch.setattr(GroupProcess, "launch", spy)
    monkeypatch.setattr(servers, "detect", lambda: SimpleNamespace(gpus=("a GPU",)))
    request = RunRequest(repository, http_port=0, grpc_port=0, metrics_port=0)
    with pytest.raises(TomeExportError, match="engine_r8"), running(request):
        pass
    ((arguments, environment),) = started
    assert FLAG in arguments
    assert environment["NVIDIA_TF32_OVERRIDE"] == "0"
