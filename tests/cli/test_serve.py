"""``tome-export serve``: what it prints, every bad input in one line, and a server until Ctrl-C."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
from pathlib import Path

import psutil
import pytest
import yaml
from manifests import engine_values

from tome_export.artifact import Artifact
from tome_export.artifact.manifest import EngineInfo
from tome_export.cli import signals
from tome_export.cli.output import Terminal
from tome_export.errors import MissingComponentError
from tome_export.serve import main as serve_module
from tome_export.serve.installation import find
from tome_export.serve.server import RunningServer

pytest.importorskip("tritonclient.grpc", reason="the serve extra is not installed")


def add_engine(artifact: Path, name: str, batch: str = "1:8:32", **more: object) -> None:
    """The record of an engine; its file is none."""
    file = "model.engine" if name == "tensorrt" else "model.rtx.engine"
    draft = artifact.with_name(file)
    draft.write_bytes(b"engine")
    tensors = {
        "inputs": [{"name": "pixel_values", "dtype": "float32", "shape": [-1, 1, 32, 32]}],
        "outputs": [{"name": "logits", "dtype": "float32", "shape": [-1, 10]}],
    }
    engine = {**engine_values(file, name), "batch": batch, **tensors, **more}
    Artifact.open(artifact).with_engine(EngineInfo.model_validate(engine), draft, "none")


WRITE = ("--repository", "models", "--no-self-test")


def test_result(run, built, tmp_path):
    options = (*WRITE, "--preprocess", "--kserve", "k.yaml")
    ran = run("serve", built, *options)
    assert (ran.code, ran.err.splitlines()[-1]) == (0, f"Write {tmp_path / 'models'}")
    assert ran.out.splitlines() == [
        "model                      versions",
        "vit_digits_r8              1         written",
        "vit_digits_r8_preprocess   1         written",
        "vit_digits_r8_postprocess  1         written",
        "vit_digits_r8_pipeline     1         written",
        "The ONNX model has fused attention: on a GPU let the server have ONNX Runtime 1.27 or "
        "later, or rebuild the artifact with --attention parts (docs/attention.md)",
        "KServe manifest: k.yaml",
        f"Repository: {tmp_path / 'models'}; ask for vit_digits_r8_pipeline",
        "Serve it: this command with --run, or NVIDIA_TF32_OVERRIDE=0 "
        f"ORT_DISABLE_TELEMETRY=1 tritonserver --model-repository={tmp_path / 'models'}",
    ]
    manifest = (tmp_path / "k.yaml").stat()
    again = run("serve", built, *options, "--json")
    assert {model["status"] for model in again.json["models"]} == {"unchanged"}
    assert again.json["entry"] == "vit_digits_r8_pipeline"
    assert (tmp_path / "k.yaml").stat().st_mtime_ns == manifest.st_mtime_ns


def test_random_weights_are_said(run, built_random):
    ran = run("serve", built_random, *WRITE)
    assert ran.out.startswith("RANDOM WEIGHTS")


def test_rtx_engines(run, artifact, tmp_path):
    add_engine(artifact, "tensorrt-rtx")
    ran = run("serve", artifact, "--repository", "models", "--format", "engine")
    assert ran.code == 3
    assert ran.error == (
        f"the only engine in {artifact} is of TensorRT-RTX: Triton Inference Server has no backend "
        f"for TensorRT-RTX engines; build one with 'tome-export engine {artifact} --engine "
        "tensorrt' on the GPU that will serve it, or serve the ONNX model with --format onnx"
    )
    assert not (tmp_path / "models").exists()
    ran = run("serve", artifact, *WRITE)
    assert ran.code == 0
    assert "no backend for TensorRT-RTX engines: the ONNX model is served" in ran.out


def test_a_version_compatible_engine_says_what_its_server_needs(run, artifact, tmp_path):
    add_engine(artifact, "tensorrt", version_compatible=True)
    flag = "--backend-config=tensorrt,version-compatible=true"
    ran = run("serve", artifact, *WRITE, "--kserve", "k.yaml")
    assert ran.out.splitlines()[-1] == (
        "Serve it: this command with --run, or tritonserver "
        f"--model-repository={tmp_path / 'models'} {flag}"
    )
    manifest = yaml.safe_load((tmp_path / "k.yaml").read_text())
    assert flag in manifest["spec"]["predictor"]["model"]["args"]
    ran = run("serve", artifact, *WRITE, "--json")
    assert ran.json["server"] == {"arguments": [flag], "environment": {}}


def test_an_engine_without_weights_is_not_served(run, artifact, tmp_path):
    add_engine(artifact, "tensorrt", stripped=True)
    line = (
        f"the engine in {artifact} has no weights (--strip-weights), and tritonserver gives it none"
    )
    ran = run("serve", artifact, "--repository", "models", "--format", "engine")
    assert (ran.code, ran.error) == (3, f"{line}; build one with weights, or serve the ONNX model")
    assert not (tmp_path / "models").exists()
    ran = run("serve", artifact, *WRITE)
    assert ran.code == 0
    assert f"{line}: the ONNX model is served" in ran.out


def test_an_engine_with_plugins_and_a_range_is_served_at_one_batch(run, artifact, tmp_path):
    build = artifact / "build.json"
    manifest = json.loads(build.read_text())
    manifest["merge"]["merge_op"] = "plugin"
    build.write_text(json.dumps(manifest))
    add_engine(artifact, "tensorrt", "1:8:32")
    ran = run("serve", artifact, *WRITE)
    assert ran.code == 0
    assert "was built for batches of 1:8:32: it is given batches of exactly 8, as" in ran.out
    assert "vit_digits_r8_fixed takes batches of exactly 8; vit_digits_r8 takes 1 to 8" in ran.out
    config = (tmp_path / "models" / "vit_digits_r8_fixed" / "config.pbtxt").read_text()
    assert "graphs" not in config


BAD = {
    "name": (
        ("--name", "a/b"),
        2,
        "model name is 'a/b'; expected letters, digits, _, - and ., such as vit_b16_r8",
    ),
    **{
        f"{option} {value}": ((option, value), 2, f"{what} is {value}; expected {least} to {most}")
        for option, what, least, most in (
            ("--version", "version", 1, 2**63 - 1),
            ("--instances", "instances", 1, 2**31 - 1),
            ("--max-queue-delay", "queue delay", 0, 2**31 - 1),
            ("--max-queue-size", "queue size", 1, 2**31 - 1),
            ("--queue-timeout", "queue timeout", 1, 2**31 - 1),
            ("--cuda-graph-batches", "CUDA graph batch", 1, 2**31 - 1),
        )
        for value in (str(least - 1), str(most + 1), "9" * 100)
    },
    "graphs of an ONNX model": (
        ("--cuda-graph-batches", "1,8"),
        2,
        "CUDA graph batches are given and the ONNX model is served; leave them out, or serve a "
        "TensorRT engine with --format engine",
    ),
    "port too large": (
        ("--run", "--grpc-port", "65536"),
        2,
        "port is 65536; expected 0 to 65535, 0 for a free one",
    ),
    "negative port": (
        ("--run", "--metrics-port", "-1"),
        2,
        "port is -1; expected 0 to 65535, 0 for a free one",
    ),
    "port twice": (
        ("--run", "--http-port", "8001"),
        2,
        "port 8001 is given twice; give different ones, or 0 for free ones",
    ),
    "ready timeout": (
        ("--run", "--ready-timeout", "0"),
        2,
        "ready timeout is 0; expected seconds above 0",
    ),
    "graphs no numbers": (
        ("--cuda-graph-batches", "1,x"),
        2,
        "Invalid value for '--cuda-graph-batches': '1,x' is not a list of batch sizes such as "
        "1,8,32; see 'tome-export serve --help'",
    ),
    "no engine": (
        ("--format", "engine"),
        3,
        "{artifact} has no engine; build one with 'tome-export engine {artifact} --engine "
        "tensorrt' on the GPU that will serve it, or serve the ONNX model with --format onnx",
    ),
    "storage URI": (
        ("--kserve", "k.yaml", "--storage-uri", "models"),
        2,
        "storage URI is 'models'; expected one such as s3://bucket/models or pvc://claim/models",
    ),
    "storage URI alone": (
        ("--storage-uri", "s3://x"),
        2,
        "--storage-uri is for the manifest of --kserve FILE; give both; see 'tome-export serve "
        "--help'",
    ),
    "log alone": (
        ("--log",),
        2,
        "--log shows the log of a server; give --run too; see 'tome-export serve --help'",
    ),
    "manifest is a folder": (
        ("--kserve", "."),
        3,
        ". is a folder; give the name of a file",
    ),
    "manifest of too long a name": (
        ("--kserve", "k" * 250),
        3,
        f"cannot write {'k' * 250}: the name is too long; give a shorter one",
    ),
    "manifest where no file can be": (
        ("--kserve", "/proc/k.yaml"),
        3,
        "cannot write /proc/k.yaml: its folder does not exist; make it or give another file",
    ),
    "manifest in no folder": (
        ("--kserve", "no/k.yaml"),
        3,
        "cannot write no/k.yaml: its folder does not exist; make it or give another file",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case, run, built, tmp_path):
    arguments, code, message = BAD[case]
    ran = run("serve", built, "--repository", "models", *arguments)
    assert ran.code == code
    assert ran.out == ""
    assert ran.error == message.format(artifact=built)
    assert list(tmp_path.iterdir()) == []


def test_no_artifact(run, tmp_path):
    assert run("serve", "--repository", "models").code == 2
    ran = run("serve", "nowhere", "--repository", "models")
    assert ran.code == 3
    assert ran.error.startswith(f"{tmp_path / 'nowhere'} is not an artifact: it has no build.json")
    assert list(tmp_path.iterdir()) == []


def test_damaged_artifact(run, artifact, tmp_path):
    (artifact / "model.onnx").write_bytes((artifact / "model.onnx").read_bytes()[:-1])
    ran = run("serve", artifact, *WRITE)
    assert ran.code == 3
    assert "the file is truncated or was changed" in ran.error
    assert not (tmp_path / "models").exists()


def test_repository_that_is_none(run, artifact, tmp_path):
    (tmp_path / "file").touch()
    ran = run("serve", artifact, "--repository", "file")
    assert ran.code == 3
    assert ran.error == f"repository {tmp_path / 'file'} is a file; give a directory"
    ran = run("serve", artifact, "--repository", "/")
    assert ran.code == 3
    assert ran.error == "repository is /, which has no name; give a directory of its own"
    ran = run("serve", artifact, "--repository", artifact)
    assert ran.code == 3
    assert ran.error == f"repository {artifact} is an artifact; give a directory of its own"
    ran = run("serve", artifact, "--repository", artifact / "models")
    assert ran.code == 3
    assert ran.error == (
        f"repository {artifact / 'models'} is inside the artifact {artifact}; give a directory of "
        "its own"
    )
    assert not (artifact / "models").exists()
    ran = run("serve", artifact, "--repository", "file/models")
    assert ran.code == 3
    assert ran.error == (
        f"cannot write {tmp_path / 'file' / 'models'}: a part of the path is a file; give another "
        "directory"
    )


def test_graph_above_the_largest_batch(run, artifact, tmp_path):
    add_engine(artifact, "tensorrt", "1:2:4")
    ran = run("serve", artifact, "--repository", "models", "--cuda-graph-batches", "1,8")
    assert ran.code == 3
    assert ran.error == (
        "config.pbtxt of model vit_digits_r8 has a CUDA graph for batch 8; expected 1 to "
        "max_batch_size, 4"
    )
    assert not (tmp_path / "models").exists()


def test_artifacts_of_different_models(run, built, built_random, tmp_path):
    ran = run("serve", built, built_random, "--repository", "models")
    assert ran.code == 3
    assert ran.error == (
        f"{built} and {built_random} have different weights; several artifacts served together "
        "must be of one model, with different r or image sizes"
    )
    ran = run("serve", built, built, "--repository", "models")
    assert ran.code == 3
    assert "merge the same tokens per layer" in ran.error
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def read_only(tmp_path):
    folder = tmp_path / "mounted"
    folder.mkdir()
    if shutil.which("mount") is None or os.geteuid() != 0:
        pytest.skip("mounting a filesystem needs root")
    command = ["mount", "-t", "tmpfs", "-o", "ro", "none", str(folder)]
    if subprocess.run(command, capture_output=True, check=False).returncode != 0:
        pytest.skip("this machine does not let a filesystem be mounted")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_read_only_repository(run, built, read_only):
    for repository in (read_only, read_only / "models"):
        ran = run("serve", built, "--repository", repository)
        assert ran.code == 3
        assert ran.error == (
            f"cannot write {repository}: the filesystem is read-only; give another directory"
        )


def test_manifest_on_a_read_only_filesystem(run, built, read_only, tmp_path):
    ran = run("serve", built, "--repository", "models", "--kserve", read_only / "k.yaml")
    assert ran.code == 3
    assert ran.error == (
        f"cannot write {read_only / 'k.yaml'}: the filesystem is read-only; give another file"
    )
    assert not (tmp_path / "models").exists()


def test_manifest_over_a_file_of_another_kind(run, built, tmp_path):
    (tmp_path / "k.yaml").write_bytes(b"\xff")
    assert run("serve", built, *WRITE, "--kserve", "k.yaml").code == 0
    assert (tmp_path / "k.yaml").read_text().startswith("# The whole repository")


def test_ready_timeout_is_said(run, built):
    find_or_skip()
    ports = [f"--{name}-port=0" for name in ("http", "grpc", "metrics")]
    arguments = (*WRITE, "--run", "--ready-timeout", "0.001", *ports)
    ran = run("serve", built, *arguments)
    assert ran.code == 6
    assert "not ready after 0.001 s" in ran.error
    assert "allow more time (--ready-timeout): the first start on a GPU" in ran.error


def test_help_says_how_a_server_ends(run):
    text = " ".join(run("serve", "--help").out.split())
    assert "ended by Ctrl-C or SIGTERM, and the exit code is then 0" in text
    assert "Takes 2 instances or more" in text


def find_or_skip():
    try:
        find()
    except MissingComponentError as error:
        pytest.skip(str(error))


PORTS = [f"--{name}-port=0" for name in ("http", "grpc", "metrics")]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_as_soon_as_the_server_is_ready(run, built, monkeypatch, number):
    """In the moment between «Ready» and the waiting that follows."""
    find_or_skip()
    shown = Terminal.result

    def result(self, *arguments):
        shown(self, *arguments)
        signal.raise_signal(number)

    monkeypatch.setattr(Terminal, "result", result)
    ran = run("serve", built, *WRITE, "--run", *PORTS)
    assert (ran.code, ran.err.splitlines()[-1]) == (0, "Stopping tritonserver")
    assert "Ready; Ctrl-C ends it" in ran.out


def test_a_second_signal_while_the_server_ends(run, built, monkeypatch):
    find_or_skip()
    monkeypatch.setattr(signals, "GRACE_S", 0.0)
    stop = RunningServer.stop

    def wait(*_):
        signal.raise_signal(signal.SIGINT)

    def impatient(self, *_):
        try:
            signal.raise_signal(signal.SIGINT)
        finally:
            stop(self, 0)

    monkeypatch.setattr(RunningServer, "wait", wait)
    monkeypatch.setattr(RunningServer, "stop", impatient)
    ran = run("serve", built, *WRITE, "--run", *PORTS)
    assert (ran.code, ran.err.splitlines()[-1]) == (0, "Stopping tritonserver")


@pytest.mark.parametrize(
    ("stage", "options"), [("Start", ["--no-self-test"]), ("Try", ["--self-test"])]
)
def test_a_signal_before_the_server_is_ready(start, built, tmp_path, stage, options):
    find_or_skip()
    process = start("serve", built, "--repository", "models", *options, "--run", *PORTS)
    for line in process.stderr:
        if line.startswith(stage):
            break
    for _ in range(2):
        process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert (process.returncode, out) == (130, "")
    assert err.splitlines()[-1] == "Error: interrupted; nothing half-made was left behind"
    assert (tmp_path / "models").exists() == (stage == "Start")
    assert {path.name for path in (tmp_path / "tmp").iterdir()} <= {".ses"}
    assert not [*tmp_path.glob(".models*")]


def test_the_self_test(run, built, tmp_path):
    find_or_skip()
    ran = run("serve", built, "--repository", "models", "--preprocess")
    assert ran.code == 0
    assert "Self-test: 4 models answered on the CPU" in ran.out
    stages = ["Try the models out on one image", f"Write {tmp_path / 'models'}"]
    assert ran.err.splitlines()[-2:] == stages
    assert not [*tmp_path.glob(".models*")]


def test_what_cannot_be_tried_out_is_said(run, artifact, tmp_path, monkeypatch):
    def missing():
        raise MissingComponentError("no server")

    monkeypatch.setattr(serve_module, "find", missing)
    ran = run("serve", artifact, "--repository", "models", "--self-test")
    assert (ran.code, ran.error) == (4, "no server; leave --self-test out")
    assert not (tmp_path / "models").exists()
    ran = run("serve", artifact, "--repository", "models")
    assert (ran.code, "No self-test: no server" in ran.out) == (0, True)
    monkeypatch.undo()
    find_or_skip()
    add_engine(artifact, "tensorrt")
    monkeypatch.chdir(tmp_path)
    ran = run("serve", artifact, "--repository", "other")
    said = "No self-test: what is served runs on GPUs, and this machine has none that CUDA sees"
    assert (ran.code, said in ran.out) == (0, True)


@pytest.mark.parametrize("ended_by", [signal.SIGINT, signal.SIGTERM])
def test_run_until_it_is_ended(cli, built, tmp_path, ended_by):
    find_or_skip()
    process = cli("serve", built, *WRITE, "--run", "--log", "--json", *PORTS)
    text = ""
    for line in process.stdout:
        text += line
        if line == "}\n":
            break
    server = json.loads(text)["server"]
    assert all(server[name].startswith("127.0.0.1:") for name in ("http", "grpc", "metrics"))
    from tritonclient.grpc import InferenceServerClient

    with InferenceServerClient(server["grpc"]) as client:
        assert client.is_model_ready("vit_digits_r8")
    children = psutil.Process(process.pid).children()
    assert children
    process.send_signal(ended_by)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 0, err
    assert "Stopping tritonserver" in err
    assert "successfully loaded 'vit_digits_r8'" in err  # --log
    assert [child for child in children if child.is_running()] == []
    # ONNX Runtime leaves a file of its own.
    assert {path.name for path in (tmp_path / "tmp").iterdir()} <= {".ses"}
