"""Processes of python models that die or stop: noticed, and what is done about it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from tome_export.errors import ExportError
from tome_export.serve import process as processes
from tome_export.serve import server as servers
from tome_export.serve.client import connect
from tome_export.serve.config import ServeOptions
from tome_export.serve.kserve import HTTP_PORT
from tome_export.serve.main import ServeRequest, serve
from tome_export.serve.probe import stub_states
from tome_export.serve.server import RunRequest, running

pytestmark = pytest.mark.usefixtures("installation")

X = np.ones((1, 4), np.float32)


@pytest.fixture
def repository(by_hand, tmp_path):
    by_hand.write_identity(tmp_path / "repository")
    return tmp_path / "repository"


@pytest.fixture
def at_once(monkeypatch):
    """No patience."""
    monkeypatch.setattr(servers, "CHECK_SECONDS", 0.0)
    monkeypatch.setattr(processes, "STOPPED_SECONDS", 0.3)


def stub_of(server, model):
    """Process id of the only stub of a model."""
    (found,) = (
        pid
        for pid in stub_states(server.pid)
        if f"/{model}/" in Path(f"/proc/{pid}/cmdline").read_text()
    )
    return found


def restarted(server, events, seconds=20):
    deadline = time.monotonic() + seconds
    while not server.restart_if_broken(events.append):
        assert time.monotonic() < deadline, "not noticed"
        time.sleep(0.02)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGRTMIN + 6, signal.SIGSTOP])
@pytest.mark.usefixtures("at_once")
def test_a_lost_process_is_told_and_the_server_started_again(repository, nothing_left, number):
    with running(RunRequest(repository)) as server:
        nothing_left(server)
        addresses = (server.http, server.grpc, server.metrics)
        assert not server.restart_if_broken()
        os.kill(stub_of(server, "identity"), number)
        events = []
        restarted(server, events)
        nothing_left(server)
        done = {9: "was ended by SIGKILL", 19: "is stopped (SIGSTOP)"}.get(
            number, f"was ended by signal {number:d}"
        )
        assert events == [
            f"the process of model identity {done}; tritonserver is started again",
            "tritonserver is ready again",
        ]
        assert (server.http, server.grpc, server.metrics) == addresses
        with connect(server.grpc) as client:
            assert (client.infer("identity", {"x": X})["y"] == X).all()
        assert not server.restart_if_broken()
        server.stop(0)


def test_a_server_that_crashes_is_started_again(repository, nothing_left):
    with running(RunRequest(repository)) as server:
        nothing_left(server)
        os.kill(server.pid, signal.SIGSEGV)
        events = []
        restarted(server, events)
        nothing_left(server)
        assert events[0] == "tritonserver has crashed (SIGSEGV); tritonserver is started again"
        with connect(server.grpc) as client:
            assert (client.infer("identity", {"x": X})["y"] == X).all()
        server.stop(0)


@pytest.mark.usefixtures("at_once")
def test_a_server_that_loses_processes_again_and_again_ends(repository, nothing_left, monkeypatch):
    monkeypatch.setattr(servers, "MOST_RESTARTS", 0)
    with running(RunRequest(repository)) as server:
        nothing_left(server)
        os.kill(stub_of(server, "identity"), signal.SIGKILL)
        with pytest.raises(ExportError, match=r"model identity was ended by SIGKILL, after 0 res"):
            server.wait()


@pytest.mark.usefixtures("at_once")
def test_models_that_come_and_go_are_no_loss(repository, by_hand, nothing_left):
    from tritonclient.grpc import InferenceServerClient

    by_hand.write_identity(repository, "other")
    with running(RunRequest(repository, control="explicit", load=["identity", "other"])) as server:
        nothing_left(server)
        with InferenceServerClient(server.grpc) as client:
            for call in (client.unload_model, client.load_model):
                call("other")
                for _ in range(20):
                    assert not server.restart_if_broken()
                    time.sleep(0.02)
        server.stop(0)


def test_the_probe_of_a_manifest_fails_when_a_process_is_lost(make_artifact, tmp_path):
    import yaml

    repository, manifest = tmp_path / "repository", tmp_path / "k.yaml"
    options = ServeOptions(preprocess=True)
    serve(ServeRequest((make_artifact(),), repository, options, kserve=manifest))
    model = yaml.safe_load(manifest.read_text())["spec"]["predictor"]["model"]
    assert model["readinessProbe"]["exec"] == model["livenessProbe"]["exec"]
    assert model["startupProbe"]["httpGet"]["port"] == HTTP_PORT
    python, *words = model["readinessProbe"]["exec"]["command"]
    assert python == "python3"
    with running(RunRequest(repository, gpu=False)) as server:

        def probe():
            command = [w.replace(f"127.0.0.1:{HTTP_PORT}", server.http) for w in words]
            assert command != words
            ran = subprocess.run(
                [sys.executable, *command], capture_output=True, text=True, check=False, timeout=60
            )
            return ran.returncode, ran.stderr

        assert probe() == (0, "")
        pid = stub_of(server, "small_r8_postprocess")
        os.kill(pid, signal.SIGSTOP)
        code, said = probe()
        assert (code, said) == (1, f"process {pid} of a python model does not run (state T)\n")
        os.kill(pid, signal.SIGCONT)
        assert probe() == (0, "")
        os.kill(pid, signal.SIGKILL)
        code, said = probe()
        assert (code, said) == (1, f"process {pid} of a python model does not run (state Z)\n")
        server.stop(0)
        code, said = probe()
        assert (code, "Connection refused" in said) == (1, True)


def test_the_probe_asks_a_model(by_hand, tmp_path):
    """What the server calls ready and answers with errors."""
    from tome_export.serve import probe

    by_hand.write_refusing(tmp_path, "no")
    header = (
        '{"inputs": [{"name": "pixel_values", "shape": [1, 3, 8, 8], "datatype": "FP32", '
        '"parameters": {"binary_data_size": 768}}]}'
    )
    with running(RunRequest(tmp_path)) as server:
        with pytest.raises(SystemExit, match=r"/v2/models/no/infer: 500 .*not today"):
            probe.main(f"http://{server.http}", "no", header, "")
        with pytest.raises(SystemExit, match=r"/v2/models/none/ready: 400 "):
            probe.main(f"http://{server.http}", "no", header, "", "none")
        server.stop(0)
