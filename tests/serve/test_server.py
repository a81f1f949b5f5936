"""A real server as a child process: its start, its reasons, its end."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from tome_export.errors import ExportError, InputError, MissingComponentError, UsageError
from tome_export.serve import installation as installations
from tome_export.serve import process as processes
from tome_export.serve import server as servers
from tome_export.serve.client import connect
from tome_export.serve.server import RunRequest, running
from tome_export.serve.server_log import LIMIT, failed_models, last_words

SLOW_LOAD = """
import time
class TritonPythonModel:
    def initialize(self, args):
        time.sleep(60)
"""

# Loads once a file is there.
HELD_LOAD = """
import pathlib, time
import numpy as np
import triton_python_backend_utils as pb_utils

class TritonPythonModel:
    def initialize(self, args):
        pathlib.Path({begun!r}).touch()
        while not pathlib.Path({go!r}).exists():
            time.sleep(0.05)

    def execute(self, requests):
        inputs = [pb_utils.get_input_tensor_by_name(r, "x").as_numpy() for r in requests]
        return [pb_utils.InferenceResponse([pb_utils.Tensor("y", 2 * x)]) for x in inputs]
"""

PIXELS = np.random.default_rng(1).standard_normal((5, 3, 8, 8), dtype=np.float32)

READY_LIMIT_SECONDS = 5
"""The issue's own; measured alone on two cores it is well below one."""


def get(address: str, path: str) -> str:
    with urllib.request.urlopen(f"http://{address}{path}", timeout=5) as answer:
        return answer.read().decode()


pytestmark = pytest.mark.usefixtures("installation")


@pytest.fixture
def repository(by_hand, tmp_path):
    by_hand.write_identity(tmp_path / "repository")
    return tmp_path / "repository"


def test_ready_within_five_seconds_and_every_address_answers(repository, nothing_left):
    began = time.monotonic()
    with running(RunRequest(repository)) as server:
        seconds = time.monotonic() - began
        nothing_left(server)
        assert all(a.startswith("127.0.0.1:") for a in (server.http, server.grpc, server.metrics))
        assert "OK" in urllib.request.urlopen(f"http://{server.http}/v2/health/ready").msg
        assert "nv_inference_request_success" in get(server.metrics, "/metrics")
        with connect(server.grpc) as client:
            x = np.ones((2, 4), np.float32)
            assert (client.infer("identity", {"x": x})["y"] == x).all()
        server.stop(0)
    assert seconds < READY_LIMIT_SECONDS


@pytest.mark.parametrize("protocol", ["grpc", "http"])
@pytest.mark.parametrize("shared_memory", [False, True])
def test_answers_are_those_of_onnx_runtime(plain_server, protocol, shared_memory):
    """On a server without the real backend these are answers of the stand-in, and labelled so."""
    import onnxruntime

    server, model = plain_server
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    with connect(getattr(server, protocol), protocol) as client:
        inputs = {"pixel_values": PIXELS}
        answers = client.infer("small", inputs, shared_memory=shared_memory)
    (expected,) = session.run(["logits"], inputs)
    assert answers.keys() == {"logits"}
    if server.stand_in:
        np.testing.assert_array_equal(answers["logits"], expected)
    else:
        np.testing.assert_allclose(answers["logits"], expected, rtol=1e-5, atol=1e-5)


def test_requests_are_answered_together_and_each_with_its_own(by_hand, tmp_path, nothing_left):
    import onnxruntime
    import tritonclient.grpc

    model = by_hand.write_onnx(tmp_path, "small")
    config = tmp_path / "small" / "config.pbtxt"
    config.write_text(config.read_text().replace("_microseconds: 1000", "_microseconds: 300000"))
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    with running(RunRequest(tmp_path)) as server:
        nothing_left(server)

        def ask(part):
            with connect(server.grpc) as client:
                return client.infer("small", {"pixel_values": part})["logits"]

        parts = [PIXELS[:1], PIXELS[1:3], PIXELS[3:5]]
        with ThreadPoolExecutor(3) as pool:
            answers = list(pool.map(ask, parts))
        with tritonclient.grpc.InferenceServerClient(server.grpc) as client:
            for _ in range(200):  # the server counts an answer after it has sent it
                statistics = client.get_inference_statistics("small").model_stats[0]
                if statistics.inference_count == len(PIXELS):
                    break
                time.sleep(0.05)
        server.stop(0)
    assert statistics.inference_count == len(PIXELS)
    assert statistics.execution_count < len(parts)
    for part, answer in zip(parts, answers, strict=True):
        (expected,) = session.run(["logits"], {"pixel_values": part})
        np.testing.assert_allclose(answer, expected, rtol=1e-5, atol=1e-5)


def test_the_stand_in_is_labelled(plain_server, installation):
    server, _ = plain_server
    assert server.stand_in == (not installation.has_onnxruntime)


def test_the_graceful_end_leaves_nothing(repository, nothing_left):
    with running(RunRequest(repository)) as server:
        nothing_left(server)
        group = server.pid
        assert server.is_alive()
    assert not server.is_alive()
    server.stop()  # once more does no harm
    with pytest.raises(ProcessLookupError):
        os.kill(group, 0)


def test_nothing_is_written_into_the_repository(repository, nothing_left):
    before = sorted(repository.rglob("*"))
    with running(RunRequest(repository)) as server:
        nothing_left(server)
        server.stop(0)
    assert sorted(repository.rglob("*")) == before


def test_the_log_comes_line_by_line(repository, nothing_left):
    lines: list[str] = []
    with running(RunRequest(repository, on_log=lines.append)) as server:
        nothing_left(server)
        server.stop(1)
    assert any("successfully loaded 'identity'" in line for line in lines)
    assert any("Signal (15) received." in line for line in lines)


def test_a_killed_server_is_told_and_leaves_nothing(repository, by_hand, nothing_left):
    with running(RunRequest(repository)) as server:
        nothing_left(server)
        assert len(by_hand.members(server.pid)) > 1  # the server and its model's process
        os.kill(server.pid, signal.SIGKILL)
        with pytest.raises(ExportError, match=r"ended by SIGKILL while serving; .*start it again"):
            server.wait()


def test_an_error_in_the_block_ends_the_server(repository, nothing_left):
    started = []

    def use():
        with running(RunRequest(repository)) as server:
            nothing_left(server)
            started.append(server)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        use()
    assert not started[0].is_alive()


def test_asked_to_stop_by_another(repository, nothing_left):
    with running(RunRequest(repository)) as server:
        nothing_left(server)
        os.kill(server.pid, signal.SIGTERM)
        with pytest.raises(ExportError) as raised:
            server.wait()
    assert str(raised.value) == (
        "tritonserver was asked to stop by SIGTERM while serving, not by us; start it again"
    )


def until(condition, seconds):
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)
    return condition()


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_killed_while_loading_the_repository_stays_usable(
    repository, by_hand, tmp_path, nothing_left
):
    import onnxruntime

    begun, go = tmp_path / "begun", tmp_path / "go"
    code = HELD_LOAD.format(begun=str(begun), go=str(go))
    by_hand.write_identity(repository, "held", code)
    onnx_model = by_hand.write_onnx(repository)
    before = contents(repository)
    with running(RunRequest(repository, ready_seconds=None)) as server:
        nothing_left(server)
        assert until(begun.exists, 20)
        os.kill(server.pid, signal.SIGKILL)
        with pytest.raises(ExportError, match="ended by SIGKILL while loading"):
            server.wait_ready(5)
    assert contents(repository) == before
    go.touch()
    x = np.arange(8, dtype=np.float32).reshape(2, 4)
    session = onnxruntime.InferenceSession(onnx_model, providers=["CPUExecutionProvider"])
    with running(RunRequest(repository)) as again:
        nothing_left(again)
        with connect(again.grpc) as client:
            np.testing.assert_array_equal(client.infer("held", {"x": x})["y"], 2 * x)
            np.testing.assert_array_equal(client.infer("identity", {"x": x})["y"], x)
            logits = client.infer("small", {"pixel_values": PIXELS})["logits"]
        again.stop(0)
    (expected,) = session.run(["logits"], {"pixel_values": PIXELS})
    np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("delay", [0.0, 0.05, 0.2])
def test_killed_right_after_its_start(repository, nothing_left, delay):
    with running(RunRequest(repository, ready_seconds=None)) as server:
        nothing_left(server)
        time.sleep(delay)
        os.kill(server.pid, signal.SIGKILL)
    with running(RunRequest(repository)) as again:
        x = np.ones((1, 4), np.float32)
        with connect(again.grpc) as client:
            np.testing.assert_array_equal(client.infer("identity", {"x": x})["y"], x)
        again.stop(0)


def test_not_ready_in_time(repository, by_hand, nothing_left):
    by_hand.write_identity(repository, "slow", SLOW_LOAD)
    with running(RunRequest(repository, ready_seconds=None)) as server:
        nothing_left(server)
        with pytest.raises(ExportError, match=r"not ready after 0\.5 s: .*; allow more time"):
            server.wait_ready(0.5)
        server.stop(0)


SERVE = """
import sys
from pathlib import Path
from tome_export.serve.server import RunRequest, running
with running(RunRequest(Path(sys.argv[1]))) as server:
    print(server.pid, server.log_path.parent, flush=True)
    server.wait()
"""


def test_ctrl_c_ends_the_server(repository, by_hand):
    process = subprocess.Popen(
        [sys.executable, "-c", SERVE, str(repository)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    try:
        group = int(process.stdout.readline().split()[0])
        assert len(by_hand.members(group)) > 1
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=20)
    finally:
        process.kill()
        process.communicate()
    assert "KeyboardInterrupt" in err
    assert by_hand.members(group) == []
    assert list(servers.SHARED_MEMORY.glob(f"tome_export_{process.pid}_*")) == []


@pytest.mark.parametrize("ready", [True, False], ids=["serving", "loading"])
def test_a_server_whose_parent_is_killed_ends_and_leaves_nothing(
    repository, by_hand, tmp_path, ready
):
    begun, code = tmp_path / "begun", SERVE
    if not ready:
        held = HELD_LOAD.format(begun=str(begun), go=str(tmp_path / "never"))
        by_hand.write_identity(repository, "held", held)
        code = SERVE.replace("(sys.argv[1])", "(sys.argv[1]), ready_seconds=None")
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(repository)], stdout=subprocess.PIPE, text=True
    )
    try:
        group, folder = process.stdout.readline().split()
        assert ready or until(begun.exists, 20)
        memory = f"tome_export_{process.pid}_*"
        assert len(by_hand.members(int(group))) > 1
        assert list(servers.SHARED_MEMORY.glob(memory))
    finally:
        process.kill()  # SIGKILL: nothing of ours can run any more
        process.communicate()
    ended = until(lambda: not by_hand.naming(folder), servers.STOP_SECONDS + 10)
    if not ended:
        os.killpg(int(group), signal.SIGKILL)
    assert ended
    assert by_hand.members(int(group)) == []
    assert list(servers.SHARED_MEMORY.glob(memory)) == []
    assert not Path(folder).exists()


def test_a_server_goes_on_without_its_watchdog(repository, by_hand):
    with running(RunRequest(repository)) as server:
        (watchdog,) = set(by_hand.naming(str(server.log_path.parent))) - set(
            by_hand.members(server.pid)
        )
        os.kill(watchdog, signal.SIGKILL)
        x = np.ones((1, 4), np.float32)
        with connect(server.grpc) as client:
            np.testing.assert_array_equal(client.infer("identity", {"x": x})["y"], x)
        server.stop(0)
        assert until(lambda: not by_hand.members(server.pid), 10)  # what was killed is collected


def test_no_shell_to_watch_with(repository, monkeypatch, tmp_path):
    monkeypatch.setattr(processes, "SHELL", str(tmp_path / "sh"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with pytest.raises(ExportError, match=r"cannot start .*sh, .*No such file.*; install a shell"):
        running(RunRequest(repository)).__enter__()
    assert list(tmp_path.glob("tome-export-server-*")) == []


RAISES = """
class TritonPythonModel:
    def initialize(self, args):
        raise ValueError("cannot read\\nthe weights")
"""


@pytest.mark.parametrize(
    ("write", "reason"),
    [
        (
            lambda hand, r: hand.write_identity(r, "bad", RAISES),
            r"bad: ValueError: cannot read the w",
        ),
        (
            lambda hand, r: hand.write_model(
                r, "bad", [("x", "FP32", [1])], [("y", "FP32", [1])], backend="none"
            ),
            "bad: unable to find .*backend .*none",
        ),
        (
            lambda hand, r: (
                hand.write_model(r, "bad", [], [], backend="python").parent / "config.pbtxt"
            ).write_text('name: "bad\n'),
            r"bad: failed to read text proto .*String literals cannot cross line boundaries",
        ),
        (
            lambda hand, r: hand.write_onnx(r, "bad").unlink(),
            r"bad: .*: model\.onnx is not in version 1",
        ),
        (
            lambda hand, r: hand.write_onnx(r, "bad").write_bytes(b"no model"),
            "bad: .*INVALID_PROTOBUF",
        ),
    ],
    ids=["python", "backend", "syntax", "no-file", "no-onnx"],
)
def test_the_server_says_in_one_line_why_it_cannot_load(repository, by_hand, write, reason):
    write(by_hand, repository)
    before = by_hand.own_memory()
    with (
        pytest.raises(InputError, match=reason) as raised,
        running(RunRequest(repository, stand_in=True)),
    ):
        pytest.fail("it started")
    message = str(raised.value)
    assert message.startswith(f"tritonserver cannot load {repository}: bad: ")
    assert "\n" not in message
    assert "identity" not in message  # the model that is well
    assert by_hand.own_memory() == before


def test_a_taken_port(repository):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with (
            pytest.raises(UsageError, match=f"{port}: Address already in use; choose another port"),
            running(RunRequest(repository, grpc_port=port)),
        ):
            pytest.fail("it started")


def test_a_free_port_lost_to_another_is_no_failure(repository, monkeypatch, nothing_left):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        real, asked = servers.free_ports, []

        def free_ports(host, wanted):
            ports = real(host, wanted)
            asked.append(ports)
            if len(asked) == 1:
                ports = (taken.getsockname()[1], *ports[1:])
            return ports

        monkeypatch.setattr(servers, "free_ports", free_ports)
        with running(RunRequest(repository)) as server:
            nothing_left(server)
            assert server.http == f"127.0.0.1:{asked[-1][0]}"
            assert len(asked) == 2
            server.stop(0)


def test_a_config_of_another_name_and_models_on_request(repository, by_hand, nothing_left):
    by_hand.write_identity(repository, "other")
    config = repository / "other" / "config.pbtxt"
    (repository / "other" / "configs").mkdir()
    (repository / "other" / "configs" / "cpu.pbtxt").write_text(config.read_text())
    config.write_text(config.read_text().replace("KIND_CPU", "KIND_GPU"))
    options = {"control": "explicit", "load": ["other"], "gpu": False}
    with running(RunRequest(repository, **options)) as server:
        nothing_left(server)
        with connect(server.grpc) as client:
            assert client.models() == ["other"]
        server.stop(0)


def test_nothing_to_serve(tmp_path):
    with (
        pytest.raises(InputError, match=r"no model .*'tome-export serve ARTIFACT"),
        running(RunRequest(tmp_path)),
    ):
        pass
    with pytest.raises(InputError, match="is not a folder"), running(RunRequest(tmp_path / "none")):
        pass


def test_a_host_that_is_not_here(repository):
    with pytest.raises(UsageError, match=r"cannot listen on 203\.0\.113\.1"):
        running(RunRequest(repository, host="203.0.113.1")).__enter__()


def test_no_server_installed(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(installations.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(MissingComponentError, match=r"no tritonserver on PATH .*nvidia-pytriton"):
        installations.find()


def test_numpy_2_is_refused_where_its_answers_would_be_empty(monkeypatch, tmp_path, installation):
    if installation.stub is None:
        pytest.skip("this server brings its own Python")
    monkeypatch.setattr(installations, "version", lambda _: "2.0.1")
    monkeypatch.setattr(installations, "OLDER_NUMPY", tmp_path)
    with pytest.raises(MissingComponentError, match=f"NumPy 1 .*--target {tmp_path} 'numpy<2'"):
        installations.find()


def test_a_server_on_the_path_comes_first_and_keeps_its_backends(monkeypatch, tmp_path):
    binary = tmp_path / "bin" / "tritonserver"
    for name in ("onnxruntime", "python", "tensorrt"):
        (tmp_path / "backends" / name).mkdir(parents=True)
    binary.parent.mkdir()
    binary.write_text("#!/bin/sh\nexit 3\n")
    binary.chmod(0o755)
    monkeypatch.setenv("PATH", str(binary.parent))
    found = installations.find()
    assert (found.binary, found.stub, found.has_onnxruntime) == (binary, None, True)
    unused = tmp_path / "unused"
    assert found.prepare_backends(unused, stand_in=False) == tmp_path / "backends"
    # Only if asked for does the stand-in take the real backend's place; the others stay.
    (tmp_path / "own").mkdir()
    own = found.prepare_backends(tmp_path / "own", stand_in=True)
    assert sorted(p.name for p in own.iterdir()) == ["onnxruntime", "python", "tensorrt"]
    assert (own / "onnxruntime" / "model.py").read_bytes() == installations.STAND_IN.read_bytes()
    assert list((tmp_path / "backends" / "onnxruntime").iterdir()) == []


def test_a_server_that_does_not_run_says_so_itself(monkeypatch, repository, tmp_path):
    binary = tmp_path / "bin" / "tritonserver"
    binary.parent.mkdir()
    binary.write_text("#!/bin/sh\necho 'libfoo.so.1: cannot open shared object file'\nexit 127\n")
    binary.chmod(0o755)
    monkeypatch.setenv("PATH", f"{binary.parent}:/bin:/usr/bin")
    expected = "exit code 127 while loading: libfoo.so.1: cannot open shared object file"
    with pytest.raises(ExportError, match=expected), running(RunRequest(repository)):
        pass


def test_reasons_in_logs_of_other_versions():
    log = (
        "I1120 17:26:27.054272 28583 model_lifecycle.cc:472] loading: a:1\n"
        "E1120 17:26:27.054440 28583 model_lifecycle.cc:642] failed to load 'a' version 1: "
        f"Internal: onnx runtime error 2: {'long ' * 200}\n"
        "error: creating server: Internal - failed to load all models\n"
    )
    assert failed_models(log).keys() == {"a"}
    assert failed_models(log)["a"].startswith("onnx runtime error 2: long")
    assert len(failed_models(log)["a"]) == LIMIT + 1
    assert last_words(log) == "creating server: Internal - failed to load all models"
    assert last_words("") == "it said nothing"
