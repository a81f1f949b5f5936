"""Repositories: whole, idempotent, and nobody else's models touched; then read by a real server."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tome_export.errors import InputError, UsageError
from tome_export.serve import repository as repository_module
from tome_export.serve.main import ServeOptions, ServeRequest, serve
from tome_export.serve.repository import STAGING, versions_of
from tome_export.serve.server import RunRequest, running

pytest.importorskip("tritonclient.grpc", reason="the serve extra is not installed")


@pytest.fixture
def repository(tmp_path) -> Path:
    return tmp_path / "repository"


@pytest.fixture
def put(repository):
    """``put(artifact, ..., option=value)``: serve into the repository; the statuses by model."""

    def call(*artifacts, force=False, format="auto", **options):  # noqa: A002
        request = ServeRequest(
            artifacts, repository, ServeOptions(**options), format=format, force=force
        )
        return {model.name: model.status for model in serve(request).models}

    return call


def state(folder: Path) -> dict[str, tuple[int, int, bytes]]:
    """Inode, time of change and content of every file; folders by their time."""
    return {
        path.relative_to(folder).as_posix(): (
            path.stat().st_ino,
            path.stat().st_mtime_ns,
            path.read_bytes() if path.is_file() else b"",
        )
        for path in folder.rglob("*")
    }


def files(folder: Path) -> set[str]:
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}


def test_a_new_model(make_artifact, put, repository):
    artifact = make_artifact(labels=list("abcde"))
    assert put(artifact) == {"small_r8": "written"}
    assert files(repository) == {
        "small_r8/config.pbtxt",
        "small_r8/labels.txt",
        "small_r8/configs/cpu.pbtxt",
        "small_r8/1/model.onnx",
    }
    copied = repository / "small_r8" / "1" / "model.onnx"
    assert copied.read_bytes() == (artifact / "model.onnx").read_bytes()
    assert [p.name for p in repository.parent.iterdir() if STAGING in p.name] == []


@pytest.mark.parametrize("options", [{}, {"preprocess": True}])
def test_twice_changes_nothing(make_artifact, put, repository, options):
    artifacts = [make_artifact(r=[r], schedule=f"r={r} constant") for r in (0, 8)]
    assert set(put(*artifacts, **options).values()) == {"written"}
    before = state(repository)
    assert set(put(*artifacts, **options).values()) == {"unchanged"}
    assert state(repository) == before
    # Also when the version is the one that would be found.
    assert set(put(*artifacts, version=1, **options).values()) == {"unchanged"}
    assert state(repository) == before


def test_versions_are_numbers_that_the_server_can_read(tmp_path):
    for name in ("3", "10", str(2**63 - 1), str(2**63), "01", "0", "\u0663", "configs"):
        (tmp_path / name).mkdir()
    assert versions_of(tmp_path) == (3, 10, 2**63 - 1)


def test_versions_of_a_pipeline(make_artifact, put, repository):
    put(make_artifact(), preprocess=True)
    assert set(put(make_artifact(seed=1), preprocess=True, version=2).values()) == {"written"}
    before = state(repository)
    for seed in (0, 1):
        assert set(put(make_artifact(seed=seed), preprocess=True).values()) == {"unchanged"}
    assert state(repository) == before
    assert {versions_of(model) for model in repository.iterdir()} == {(1, 2)}


def test_several_artifacts_get_a_router(make_artifact, put, repository):
    artifacts = [make_artifact(r=[r], schedule=f"r={r} constant") for r in (0, 8)]
    assert [*put(*artifacts, name="vit")] == ["vit_r0", "vit_r8", "vit_router"]
    assert b"vit_r8" in (repository / "vit_router" / "1" / "routes.json").read_bytes()


def test_several_artifacts_with_preprocessing_get_a_router_of_pipelines(make_artifact, put):
    artifacts = [make_artifact(r=[r], schedule=f"r={r} constant") for r in (0, 8)]
    parts = ("", "_preprocess", "_postprocess", "_pipeline")
    assert [*put(*artifacts, preprocess=True)] == [
        *(f"small_r{r}{part}" for r in (0, 8) for part in parts),
        "small_router",
        "small_router_pipeline",
    ]


def test_batch_of_the_engine_is_that_of_its_pipeline(make_artifact, put, repository):
    put(make_artifact(engines={"tensorrt": "1:2:4"}), preprocess=True)
    configs = [path / "config.pbtxt" for path in repository.iterdir()]
    assert len(configs) == 4
    assert all("max_batch_size: 4\n" in config.read_text() for config in configs)


@pytest.mark.parametrize("end", ["_preprocess", "_postprocess", "_pipeline", "_router"])
def test_names_of_the_models_around_a_model_are_refused(make_artifact, put, repository, end):
    with pytest.raises(UsageError) as error:
        put(make_artifact(), name=f"mine{end}")
    assert str(error.value) == (
        f"model name is 'mine{end}'; names that end in {end} are given to models made around a "
        "model, choose one such as mine"
    )
    assert not repository.exists()


def test_other_models_and_versions_stay_as_they_are(make_artifact, put, repository):
    put(make_artifact(model="other"))
    put(make_artifact(), name="mine")
    others, first = state(repository / "other_r8"), state(repository / "mine" / "1")
    assert put(make_artifact(seed=1), name="mine", version=7) == {"mine": "written"}
    assert versions_of(repository / "mine") == (1, 7)
    assert state(repository / "other_r8") == others
    assert state(repository / "mine" / "1") == first
    # Each is found again by its files.
    assert put(make_artifact(seed=1), name="mine") == {"mine": "unchanged"}
    assert put(make_artifact(seed=0), name="mine") == {"mine": "unchanged"}


def test_other_files_in_the_same_version(make_artifact, put, repository):
    put(make_artifact())
    before = state(repository)
    model = repository / "small_r8"
    with pytest.raises(InputError) as error:
        put(make_artifact(seed=1))
    assert str(error.value) == (
        f"{model} has version 1 of other files; give --version 2 to add one, --version 1 --force "
        "to replace it, or another --name"
    )
    with pytest.raises(InputError) as error:
        put(make_artifact(seed=1), version=1)
    assert str(error.value) == (
        f"{model}/1 has other files; give --version 2 to add a version, or --force to replace this "
        "one"
    )
    assert state(repository) == before
    other = make_artifact(seed=1)
    assert put(other, version=1, force=True) == {"small_r8": "written"}
    assert (model / "1" / "model.onnx").read_bytes() == (other / "model.onnx").read_bytes()
    assert [p.name for p in repository.parent.iterdir() if STAGING in p.name] == []


def test_other_options_change_the_config_alone(make_artifact, put, repository):
    put(make_artifact())
    before = state(repository / "small_r8" / "1")
    assert put(make_artifact(), instances=2) == {"small_r8": "written"}
    assert "count: 2" in (repository / "small_r8" / "config.pbtxt").read_text()
    assert "count: 2" in (repository / "small_r8" / "configs" / "cpu.pbtxt").read_text()
    assert state(repository / "small_r8" / "1") == before


def test_what_someone_else_wrote_is_never_replaced(make_artifact, put, repository):
    config = repository / "small_r8" / "config.pbtxt"
    config.parent.mkdir(parents=True)
    config.write_text('name: "small_r8"\n')
    with pytest.raises(InputError, match="is not one that 'tome-export serve' wrote; give another"):
        put(make_artifact(), force=True, version=1)
    assert files(repository) == {"small_r8/config.pbtxt"}


def test_files_of_others_beside_ours_stay(make_artifact, put, repository):
    put(make_artifact(labels=list("abcde")))
    model = repository / "small_r8"
    (model / "notes.txt").write_text("mine")
    (model / "configs" / "big.pbtxt").write_text('name: "small_r8"')
    put(make_artifact(seed=1), version=1, force=True)  # it has no labels
    assert files(model) == {
        "config.pbtxt",
        "configs/big.pbtxt",
        "configs/cpu.pbtxt",
        "notes.txt",
        "1/model.onnx",
    }


def test_versions_share_one_config(make_artifact, put, repository):
    put(make_artifact())
    before = state(repository)
    with pytest.raises(InputError, match="has version 1 with another platform, batch, inputs"):
        put(make_artifact(engines={"tensorrt": "1:4:8"}), version=2)
    assert state(repository) == before
    # The only version can be replaced by another kind of file: the whole model changes at once.
    put(make_artifact(engines={"tensorrt": "1:4:8"}), version=1, force=True)
    assert files(repository) == {"small_r8/config.pbtxt", "small_r8/1/model.plan"}


@pytest.mark.parametrize(
    ("owner", "stage"), [(shutil, "copyfile"), (Path, "rename"), (repository_module, "_publish")]
)
def test_a_write_that_ends_early_leaves_what_was_there(
    make_artifact, put, repository, owner, stage, monkeypatch
):
    put(make_artifact())
    before = state(repository)

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(owner, stage, interrupted)
    with pytest.raises(KeyboardInterrupt):
        put(make_artifact(model="new"))
    assert state(repository) == before
    assert [p.name for p in repository.parent.iterdir() if STAGING in p.name] == []


KILLED = """
import os, pathlib, sys
from tome_export.serve import repository
from tome_export.serve.main import ServeRequest, serve
repository._publish = lambda *_: os.kill(os.getpid(), 9)
serve(ServeRequest((pathlib.Path(sys.argv[1]),), pathlib.Path(sys.argv[2])))
"""


def test_a_killed_write_leaves_no_model_and_is_cleared_by_the_next(make_artifact, put, repository):
    put(make_artifact())
    before = state(repository)
    command = [sys.executable, "-c", KILLED, str(make_artifact(model="new")), str(repository)]
    assert subprocess.run(command, check=False).returncode == -9
    assert state(repository) == before
    left = [p for p in repository.parent.iterdir() if STAGING in p.name]
    assert len(left) == 1
    put(make_artifact(model="third"))
    assert [p for p in repository.parent.iterdir() if STAGING in p.name] == []


def test_where_the_folder_above_cannot_be_written(make_artifact, put, repository, monkeypatch):
    """As with a mounted volume: what is new is made inside a model, where the server looks away."""
    put(make_artifact())
    beside, made, mkdir = repository.with_name(f".{repository.name}{STAGING}"), [], Path.mkdir

    def refuse(path, *arguments, **options):
        if path == beside:
            raise OSError(errno.EACCES, "no", str(path))
        made.append(path)
        mkdir(path, *arguments, **options)

    monkeypatch.setattr(Path, "mkdir", refuse)
    assert put(make_artifact(model="new")) == {"new_r8": "written"}
    assert repository / "small_r8" / STAGING in made
    assert not (repository / "small_r8" / STAGING).exists()
    assert "new_r8/1/model.onnx" in files(repository)


def test_a_repository_that_is_a_mount_of_its_own(make_artifact, put, repository):
    repository.mkdir()
    if shutil.which("mount") is None or os.geteuid() != 0:
        pytest.skip("mounting a filesystem needs root")
    command = ["mount", "-t", "tmpfs", "none", str(repository)]
    if subprocess.run(command, capture_output=True, check=False).returncode != 0:
        pytest.skip("this machine does not let a filesystem be mounted")
    try:
        put(make_artifact())
        put(make_artifact(model="new"))
        put(make_artifact(seed=1), version=1, force=True)
        names = {path.name for path in repository.rglob("*")} | {
            path.name for path in repository.parent.iterdir()
        }
        assert {path.name for path in repository.iterdir()} == {"small_r8", "new_r8"}
        # Replaced as wholes, models hold nothing that is being made.
        engine = make_artifact(engines={"tensorrt": "1:4:8"})
        for name in ("small_r8", "new_r8"):
            assert put(engine, name=name, version=1, force=True) == {name: "written"}
        assert [name for name in names if STAGING in name] == []
    finally:
        subprocess.run(["umount", str(repository)], check=True)


def test_one_writer_at_a_time(make_artifact, put, repository):
    put(make_artifact())
    descriptor = os.open(repository, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    try:
        with pytest.raises(InputError, match=r"another command is writing .*; wait for it"):
            put(make_artifact(model="new"))
    finally:
        os.close(descriptor)
    put(make_artifact(model="new"))


def test_the_exchange_where_the_kernel_has_none(tmp_path, monkeypatch):
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    repository_module.exchange(tmp_path / "a", tmp_path / "b")
    assert files(tmp_path) == {"a/b", "b/a"}
    monkeypatch.setattr(repository_module.ctypes, "CDLL", lambda *_, **__: None)
    repository_module.exchange(tmp_path / "a", tmp_path / "b")
    assert files(tmp_path) == {"a/a", "b/b"}


def test_nothing_is_made_where_a_check_fails(make_artifact, put, repository):
    artifact = make_artifact(engines={"tensorrt": "1:4:8"})
    with pytest.raises(InputError, match="CUDA graph for batch 9; expected 1 to max_batch_size, 8"):
        put(artifact, cuda_graph_batches=(9,))
    assert not repository.exists()


@pytest.mark.usefixtures("installation")
def test_the_server_takes_every_config(make_artifact, put, repository):
    """Auto-complete off: nothing is guessed. Engines need a GPU, and are validated only."""
    labels = list("abcde")
    put(make_artifact(labels=labels), preprocess=True)
    put(make_artifact(batch="4", model="fixed"))
    put(make_artifact(precision="fp16", model="half"), instances=2, max_queue_delay_us=0)
    put(make_artifact(merge_op="index_add", model="scatter"))
    put(*[make_artifact(model="two", r=[r], schedule=f"r={r} constant") for r in (0, 4)])
    with running(RunRequest(repository, http_port=0, grpc_port=0, metrics_port=0)) as server:
        from tritonclient.grpc import InferenceServerClient

        with InferenceServerClient(server.grpc) as client:
            listed = client.get_model_repository_index().models
            assert {model.name: model.state for model in listed} == {
                path.name: "READY" for path in repository.iterdir()
            }
            for model in listed:
                config = client.get_model_config(model.name).config
                assert config.name == model.name
            warm = client.get_model_config("small_r8").config
            assert [sample.name for sample in warm.model_warmup] == ["batch_1", "batch_8"]
            assert warm.instance_group[0].kind == warm.instance_group[0].KIND_CPU


@pytest.mark.usefixtures("installation")
def test_a_server_that_watches_sees_whole_models_only(make_artifact, put, repository):
    """It looks every second; versions, options and models come and are replaced meanwhile."""
    from tritonclient.grpc import InferenceServerClient

    put(make_artifact())
    with (
        running(RunRequest(repository, gpu=False, control="poll")) as server,
        InferenceServerClient(server.grpc) as client,
    ):
        put(make_artifact(seed=1), version=2)
        put(make_artifact(model="new"))
        put(make_artifact(seed=2), version=1, force=True)
        put(make_artifact(seed=2), instances=2)
        deadline = time.monotonic() + 20
        while not (client.is_model_ready("new_r8") and client.is_model_ready("small_r8", "2")):
            assert time.monotonic() < deadline, server.log_path.read_text()
            time.sleep(0.1)
        assert client.is_model_ready("small_r8", "1")
        log = server.log_path.read_text()
    assert "Poll failed" not in log
    assert "failed to load" not in log


def test_no_gpu_for_an_engine(make_artifact, put, repository):
    from tome_export.engine.gpu import detect
    from tome_export.errors import MissingComponentError

    if detect().gpus:
        pytest.skip("this machine has a GPU")
    put(make_artifact(engines={"tensorrt": "1:4:8"}))
    with (
        pytest.raises(MissingComponentError, match="is a TensorRT engine and this machine has no"),
        running(RunRequest(repository)),
    ):
        pass
