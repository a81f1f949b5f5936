"""A short soak: requests in flight while versions come and go, and proof that it counts."""

from __future__ import annotations

import contextlib
import importlib
import os
import signal
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tome_export.serve.server import RunRequest, running

MODEL = "small"
REQUESTS = 500

pytestmark = pytest.mark.usefixtures("installation")


@pytest.fixture
def soak(monkeypatch):
    """``benchmarks/soak.py``."""
    monkeypatch.syspath_prepend(Path(__file__).parents[2])
    return importlib.import_module("benchmarks.soak")


@pytest.fixture
def run(soak, make_artifact, tmp_path):
    """Soak a server of two tiny artifacts; returns the row."""
    artifacts = [make_artifact(seed=seed, scale=0.05) for seed in (0, 1)]
    (tmp_path / "images").mkdir()
    paths = [tmp_path / "images" / f"{index}.png" for index in range(8)]
    for path in paths:
        noise = np.random.default_rng(len(path.name)).integers(0, 255, (8, 8, 3), np.uint8)
        Image.fromarray(noise ^ int(path.stem)).save(path)
    expected = soak.expected_scores(artifacts, paths)
    assert soak.told_apart(expected).all()

    def call(during=lambda _: contextlib.nullcontext(), **options):
        deployments = soak.Deployments(tmp_path / "repository", artifacts, MODEL)
        deployments.deploy(lambda _: None)
        models = sorted(path.name for path in (tmp_path / "repository").iterdir())
        with (
            running(
                RunRequest(tmp_path / "repository", gpu=False, control="explicit", load=models)
            ) as server,
            during(server) as beside,
        ):
            row = soak.soak(
                server,
                deployments,
                MODEL,
                [path.read_bytes() for path in paths],
                expected,
                requests=REQUESTS,
                concurrency=16,
                every_seconds=1.0,
                **options,
            )
        return row, beside

    return call


def test_nothing_is_wrong_or_lost_beside_deployments_garbage_and_a_killed_process(soak, run, capfd):
    row, garbage = run(
        lambda server: soak.Garbage(server, MODEL, (3, 8, 8)), kill=f"{MODEL}_preprocess"
    )
    assert (row["wrong"], row["lost"], row["failed_reloads"]) == (0, 0, 0)
    assert row["requests"] >= REQUESTS
    assert row["reloads"] >= 3
    # Both were seen, so the new version did take over each time.
    assert min(row["answers_by_artifact"]) > 0
    assert (row["restarts"], row["lost_during_restarts"] > 0) == (1, True)
    assert "of model small_preprocess was ended by SIGKILL" in capfd.readouterr().err
    assert garbage.answered == {}
    assert {kind.split(" ")[0] for kind in garbage.sent} == {"http", "grpc"}


def test_a_server_that_dies_loses_requests_and_deployments(run, capfd):
    @contextlib.contextmanager
    def kill_soon(server):
        threading.Timer(0.5, os.kill, (server.pid, signal.SIGKILL)).start()
        yield

    row, _ = run(kill_soon)
    assert row["lost"] > 0
    assert row["failed_reloads"] > 0
    assert "deployment failed" in capfd.readouterr().err


def test_another_models_answers_are_wrong(soak):
    expected = np.array([[1.0, 0.0], [0.0, 1.0]])
    tally = soak.Tally()
    tally.count(np.array([1.0, 5e-6]), expected, {0}, 0.1)
    assert (tally.wrong, tally.sources, tally.largest_error) == (0, {0: 1}, 5e-6)
    tally.count(np.array([0.0, 1.0]), expected, {0}, 0.1)  # the version before
    tally.count(np.array([1.0, 2e-5]), expected, {0, 1}, 0.1)
    tally.count(np.array([np.nan, 0.0]), expected, {0, 1}, 0.1)
    assert tally.wrong == 3
    tally.count(np.array([0.0, 1.0]), expected, {0, 1}, 0.1)
    assert tally.sources == {0: 1, 1: 1}


def test_artifacts_that_cannot_be_told_apart_are_seen(soak):
    expected = np.array([[[1.0, 0.0], [0.5, 0.5]], [[1.0, 5e-5], [0.4, 0.6]]])
    assert soak.told_apart(expected).tolist() == [False, True]


def test_what_may_answer_is_what_is_deployed(soak, make_artifact, tmp_path):
    deployments = soak.Deployments(tmp_path, [make_artifact(seed=s) for s in (0, 1)], MODEL)
    seen = []
    for _ in range(3):
        deployments.deploy(lambda name: seen.append((name, deployments.started)))
    names = [f"{MODEL}{end}" for end in ("", "_preprocess", "_postprocess", "_pipeline")]
    assert seen == [(name, version) for version in (1, 2, 3) for name in names]
    assert deployments.finished == 3
    assert [deployments.source(v) for v in (1, 2, 3)] == [0, 1, 0]
    assert sorted(p.name for p in (tmp_path / MODEL).iterdir() if p.name.isdigit()) == [*"123"]
