"""What a server is started with, as the models of a repository want it."""

from __future__ import annotations

import shlex
from types import SimpleNamespace

import pytest
import yaml

from tome_export.errors import InputError, TomeExportError
from tome_export.serve import server as servers
from tome_export.serve.config import ServeOptions
from tome_export.serve.kserve import KServeOptions, manifest_text
from tome_export.serve.main import ServeRequest, serve
from tome_export.serve.process import GroupProcess
from tome_export.serve.server import (
    RunRequest,
    ServerOptions,
    running,
    server_options_from_repository,
)

pytest.importorskip("tritonclient.grpc", reason="the serve extra is not installed")

FLAG = "--backend-config=tensorrt,version-compatible=true"
ENGINE = {"engines": {"tensorrt": "1:4:8"}}
SILENT = {"ORT_DISABLE_TELEMETRY": "1"}


@pytest.mark.parametrize(
    ("artifact", "arguments", "environment"),
    [
        (ENGINE, (), {}),
        ({**ENGINE, "version_compatible": True}, (FLAG,), {}),
        ({"batch": "4", "engines": {"tensorrt": "4"}, "version_compatible": True}, (FLAG,), {}),
        ({}, (), {"NVIDIA_TF32_OVERRIDE": "0", **SILENT}),
        ({"merge_op": "index_add"}, (), SILENT),
    ],
)
def test_options(make_artifact, tmp_path, artifact, arguments, environment):
    repository = tmp_path / "a repository"
    done = serve(ServeRequest((make_artifact(**artifact),), repository))
    expected = ServerOptions(arguments, environment)
    assert done.server == server_options_from_repository(repository) == expected
    manifest = yaml.safe_load(manifest_text("m", KServeOptions(), done.server, []))
    model = manifest["spec"]["predictor"]["model"]
    assert (FLAG in model["args"]) == bool(arguments)
    assert model.get("env", []) == [{"name": n, "value": v} for n, v in environment.items()]
    assert shlex.split(done.server.command(repository)) == [
        *(f"{name}={value}" for name, value in environment.items()),
        *("tritonserver", f"--model-repository={repository}", *arguments),
    ]


def test_each_version_has_its_own(make_artifact, tmp_path):
    repository = tmp_path / "repository"

    def arguments(version, *, compatible, force=False):
        artifact = make_artifact(**ENGINE, version_compatible=compatible, seed=version)
        options = ServeOptions(version=version)
        done = serve(ServeRequest((artifact,), repository, options, force=force))
        assert done.server == server_options_from_repository(repository)
        return done.server.arguments

    assert arguments(1, compatible=True) == (FLAG,)
    assert arguments(2, compatible=False) == (FLAG,)  # both versions are served
    assert arguments(3, compatible=False) == ()  # the latest two are
    assert arguments(2, compatible=True, force=True) == (FLAG,)
    assert arguments(2, compatible=False, force=True) == ()


@pytest.mark.parametrize(
    "content",
    [
        b'name: "theirs"\nfield_of_a_later_server: 1\n',
        b'name: "theirs"\n# caf\xe9\n',
        b'optimization{execution_accelerators{gpu_execution_accelerator{name:"tensorrt"}}}',
    ],
)
def test_models_of_other_people_are_not_looked_at(make_artifact, tmp_path, content):
    config = tmp_path / "repository" / "theirs" / "config.pbtxt"
    config.parent.mkdir(parents=True)
    config.write_bytes(content)
    manifest = tmp_path / "kserve.yaml"
    request = ServeRequest((make_artifact(**ENGINE),), config.parents[1], kserve=manifest)
    assert serve(request).server == ServerOptions()
    assert config.read_bytes() == content


@pytest.mark.parametrize("damage", [b"field_of_a_later_server: 1\n", b"# caf\xe9\n"])
def test_a_damaged_config_of_ours_is_found_before_anything_is_written(
    make_artifact, tmp_path, damage
):
    repository = tmp_path / "repository"
    serve(ServeRequest((make_artifact(model="first"),), repository))
    config = repository / "first_r8" / "config.pbtxt"
    config.write_bytes(config.read_bytes() + damage)
    with pytest.raises(InputError, match=r"first_r8/config\.pbtxt is not a model config \("):
        serve(ServeRequest((make_artifact(model="second"),), repository))
    assert [path.name for path in repository.iterdir()] == ["first_r8"]


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
