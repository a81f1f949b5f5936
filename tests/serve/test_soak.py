"""A short soak: requests in flight while versions come and go, and proof that it counts."""

from __future__ import annotations

import importlib
import os
import signal
import threading
from pathlib import Path

import numpy as np
import pytest

from tome_export.serve.server import start

MODEL = "small"

pytestmark = pytest.mark.usefixtures("installation")


@pytest.fixture
def soak(monkeypatch):
    """``benchmarks/soak.py``."""
    monkeypatch.syspath_prepend(Path(__file__).parents[2])
    return importlib.import_module("benchmarks.soak")


@pytest.fixture
def run(soak, make_artifact, tmp_path):
    """Soak a server of two tiny artifacts; returns the row."""
    artifacts = [make_artifact(seed=seed) for seed in (0, 1)]
    images = np.random.default_rng(2).standard_normal((8, 3, 8, 8), dtype=np.float32)
    expected = soak.expected_logits(artifacts, images)

    def call(change=lambda expected: expected, during=lambda _: None):
        deployments = soak.Deployments(tmp_path / "repository", artifacts, MODEL)
        deployments.deploy(lambda: None)
        with start(
            tmp_path / "repository", config_name="cpu", control="explicit", load=[MODEL]
        ) as server:
            during(server)
            return soak.soak(
                server,
                deployments,
                MODEL,
                images,
                change(expected.copy()),
                requests=1000,
                concurrency=16,
                every_seconds=1.0,
            )

    return call


def test_no_answer_is_wrong_or_lost_while_versions_are_deployed(run):
    row = run()
    assert (row["wrong"], row["lost"], row["failed_reloads"]) == (0, 0, 0)
    assert row["requests"] >= 1000
    assert row["reloads"] >= 3
    # Both were seen, so the new version did take over each time.
    assert min(row["answers_by_artifact"]) > 0


def test_a_server_that_dies_loses_requests_and_deployments(run, capfd):
    def kill_soon(server):
        threading.Timer(0.5, os.kill, (server.pid, signal.SIGKILL)).start()

    row = run(during=kill_soon)
    assert row["lost"] > 0
    assert row["failed_reloads"] > 0
    assert "no server answers" in capfd.readouterr().err


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


def test_artifacts_that_cannot_be_told_apart_are_refused(soak, make_artifact):
    images = np.random.default_rng(2).standard_normal((2, 3, 8, 8), dtype=np.float32)
    with pytest.raises(ValueError, match="two artifacts agree"):
        soak.expected_logits([make_artifact(seed=0), make_artifact(seed=0)], images)


def test_what_may_answer_is_what_is_deployed(soak, make_artifact, tmp_path):
    deployments = soak.Deployments(tmp_path, [make_artifact(seed=s) for s in (0, 1)], MODEL)
    seen = []
    for _ in range(3):
        deployments.deploy(lambda: seen.append((deployments.finished, deployments.started)))
    assert seen == [(0, 1), (1, 2), (2, 3)]
    assert deployments.finished == 3
    assert [deployments.source(v) for v in (1, 2, 3)] == [0, 1, 0]
    assert sorted(p.name for p in (tmp_path / MODEL).iterdir() if p.name.isdigit()) == [*"123"]
