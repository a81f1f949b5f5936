"""Models are tried out on a real server before a repository is written."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from tome_export.artifact import Artifact
from tome_export.errors import ExportError, InputError, MissingComponentError
from tome_export.serve import main as serve_module
from tome_export.serve import self_test
from tome_export.serve.config import ServeOptions, model_folders
from tome_export.serve.main import ServeRequest, serve
from tome_export.serve.model_file import model_file_from_artifact
from tome_export.serve.self_test import sample_request
from tome_export.serve.server import running

pytestmark = pytest.mark.usefixtures("installation")

PREPROCESS = ServeOptions(preprocess=True)


def contents(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_what_does_not_work_is_not_written(make_artifact, by_hand, tmp_path):
    repository, memory = tmp_path / "models" / "repository", by_hand.own_memory()
    request = ServeRequest((make_artifact(scale=np.nan),), repository, PREPROCESS, self_test=True)
    with pytest.raises(InputError) as raised:
        serve(request)
    assert str(raised.value) == (
        "the self-test failed and nothing was written: model small_r8_pipeline does not answer: in "
        "ensemble 'small_r8_pipeline', the model's logits are not finite for this input; "
        "--no-self-test writes it all the same"
    )
    assert [*repository.parent.iterdir()] == []
    assert by_hand.own_memory() <= memory
    serve(ServeRequest((make_artifact(),), repository, PREPROCESS, self_test=True))
    before = contents(repository)
    again = ServeRequest(
        request.artifacts, repository, ServeOptions(version=2, preprocess=True), self_test=None
    )
    with pytest.raises(InputError, match="the self-test failed and nothing was written"):
        serve(again)
    assert contents(repository) == before
    assert [path.name for path in repository.parent.iterdir()] == [repository.name]


def test_a_server_that_crashes_once_is_tried_again(make_artifact, monkeypatch, tmp_path):
    """As it may on a busy machine while it loads; one that crashes again is an error."""
    starts = []

    @contextlib.contextmanager
    def crashing(request):
        starts.append(request)
        with running(request) as server:
            if len(starts) in crashes:
                os.kill(server.pid, signal.SIGABRT)
                while server.is_alive():
                    time.sleep(0.01)
                server.wait_ready()
            yield server

    crashes = {1, 3, 4}
    monkeypatch.setattr(self_test, "running", crashing)
    done = serve(ServeRequest((make_artifact(),), tmp_path / "a", self_test=True))
    assert len(starts) == 2
    assert "on the CPU, at the second try; at the first: tritonserver was ended" in done.self_test
    with pytest.raises(ExportError, match=r"self-test failed .* ended by SIGABRT"):
        serve(ServeRequest((make_artifact(),), tmp_path / "b", self_test=True))
    assert [path.name for path in tmp_path.glob("?")] == ["a"]


def test_what_the_server_cannot_load_is_not_written(make_artifact, monkeypatch, tmp_path):
    def damaged(*given):
        model, *more = model_folders(*given, asked_by_models=True)
        name = "1/model.onnx"
        return [type(model)(model.name, model.config, {**model.files, name: b"none"}), *more]

    monkeypatch.setattr(serve_module, "model_folders", lambda *g, **_: damaged(*g))
    repository = tmp_path / "repository"
    said = rf"nothing was written: tritonserver cannot load {repository}: small_r8: .*PROTOBUF"
    with pytest.raises(InputError, match=said):
        serve(ServeRequest((make_artifact(),), repository, self_test=True))
    assert not repository.exists()


def test_a_router_is_asked_for_what_is_new(make_artifact, tmp_path):
    """The models that it knows already are not tried again, and need not be."""
    repository = tmp_path / "repository"

    def routed(*rs):
        made = tuple(
            make_artifact(model="two", schedule=f"r={r} constant", r=[r], batch=batch)
            for r, batch in rs
        )
        options = ServeOptions(name="two")
        return serve(ServeRequest(made, repository, options, self_test=True)).self_test

    assert routed((0, "4"), (4, "1:4:8")) == "Self-test: 4 models answered on the CPU"
    (repository / "two_r0_fixed" / "1" / "model.onnx").write_bytes(b"broken since")
    assert routed((8, "1:4:8")) == "Self-test: 2 models answered on the CPU"
    routes = json.loads((repository / "two_router" / "1" / "routes.json").read_text())["routes"]
    assert [route["r"] for route in routes] == [0, 4, 8]


def test_what_needs_a_gpu_is_not_tried_without(make_artifact, tmp_path):
    for number, artifact in enumerate(
        (make_artifact(precision="bf16"), make_artifact(engines={"tensorrt": "1:4:8"}))
    ):
        repository = tmp_path / str(number)
        with pytest.raises(MissingComponentError, match="runs on GPUs, and this machine has none"):
            serve(ServeRequest((artifact,), repository, self_test=True))
        assert not repository.exists()
        done = serve(ServeRequest((artifact,), repository, self_test=None))
        assert done.self_test.startswith("No self-test: what is served runs on GPUs")


def test_requests_have_the_shapes_of_the_config(make_artifact):
    pytest.importorskip("tritonclient.grpc", reason="the serve extra is not installed")
    shapes = {"1:4:8": ("x", [1, 3, 8, 8]), "4": ("x_fixed", [4, 3, 8, 8])}
    for batch, (name, shape) in shapes.items():
        source = model_file_from_artifact(Artifact.open(make_artifact(batch=batch)))
        folder, *_ = model_folders(source, "x", ServeOptions())
        assert folder.name == name
        (pixels,) = sample_request([folder], folder.config).values()
        assert (list(pixels.shape), pixels.dtype) == (shape, np.float32)
