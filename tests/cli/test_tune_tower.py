"""``tome-export tune`` for a model without classes, end to end on a small tower."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import jsonschema
import numpy as np
import pytest
from PIL import Image

from tests.conftest import small_vit
from tome_export.artifact.schedule import read_search
from tome_export.tune import main as tune_main
from tome_export.tune import search as tune_search

SCHEMA = Path(__file__).parents[2] / "docs" / "schemas" / "schedule.schema.json"


@pytest.fixture(autouse=True)
def _tower(monkeypatch):
    """A small model, and so few schedules that no time limit ends a search."""
    monkeypatch.setattr(tune_main, "FREE", 6)
    monkeypatch.setattr(tune_search, "BASELINES", dict.fromkeys(tune_search.BASELINES, 4))
    module = SimpleNamespace(make=lambda: small_vit(depth=3, num_classes=0))
    monkeypatch.setitem(sys.modules, "own_tower", module)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """As many images as it takes for some to be held out, none like another."""
    made, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for index in range(300):
        blocks = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(blocks).resize((32, 32)).save(made / f"{index:03d}.png")
    return made


def test_a_tower_is_tuned_by_similarity_built_and_reported(run, folder, tmp_path):
    tune = ("tune", "own_tower:make", "--data", folder)
    ran = run(*tune, "--target-macs", "70%", "--json")
    assert ran.code == 0, ran.err
    written = json.loads((tmp_path / "schedule.json").read_text())
    assert ran.json == {"file": "schedule.json", **written}
    jsonschema.validate(written, json.loads(SCHEMA.read_text()))
    assert written["objective"]["metric"] == "similarity"
    found, estimate = written["found"], written["found"]["estimate"]
    absent = {"accuracy", "correct", "search_accuracy", "validation_accuracy"}
    for point in (found, written["unmerged"], written["best_constant"], *written["front"]):
        assert not absent & point.keys()
    assert found["macs"] <= 0.7 * written["unmerged"]["macs"]
    assert found["similarity"].keys() == {"mean", "lowest"}
    assert 1 - found["damage"] == pytest.approx(found["similarity"]["mean"])
    assert found["similarity"]["mean"] >= written["best_constant"]["similarity"]["mean"]
    parts = [found[f"{part}_similarity"] for part in ("search", "validation")]
    weights = [written["data"][part] for part in ("search", "validation")]
    whole = np.average([part["mean"] for part in parts], weights=weights)
    assert whole == pytest.approx(found["similarity"]["mean"])
    assert min(part["lowest"] for part in parts) == pytest.approx(found["similarity"]["lowest"])
    assert (estimate["on"], estimate["images"]) == ("held out", written["data"]["held_out"])
    assert estimate["lowest"] <= estimate["low"] <= estimate["mean"] <= estimate["high"] <= 1
    more = estimate["mean"] - estimate["best_constant"]["mean"]
    assert estimate["over_constant"]["mean"] == pytest.approx(more)
    build = ("build", "own_tower:make", "--engine", "none", "--no-check", "-o", "out")
    assert run(*build, "--schedule", "schedule.json").code == 0
    assert run("report", "out", "--samples", "0").code == 0
    page = " ".join((tmp_path / "out/report.html").read_text().split())
    assert "similarity to the unmerged model" in page
    assert f"its mean similarity is {estimate['mean']:.4f}" in page


def test_a_mean_similarity_is_met(run, folder, tmp_path):
    tune = ("tune", "own_tower:make", "--data", folder, "--limit", "64")
    ran = run(*tune, "--min-similarity", "0.97")
    assert ran.code == 0, ran.err
    found = read_search(tmp_path / "schedule.json")
    assert found.found.similarity.mean >= 0.97
    assert found.found.macs <= found.best_constant.macs < found.unmerged.macs
    lines = ran.out.splitlines()
    alike = found.found.similarity
    assert "Target           similarity of at least 0.97" in lines
    assert f"Similarity       mean {alike.mean:.4f}, lowest {alike.lowest:.4f}" in lines
    (choice,) = [line for line in lines if line.startswith("Choice")]
    assert f"; best constant r {found.found.estimate.best_constant.mean:.4f}: " in choice
    assert choice.endswith("; optimistic, the schedule was chosen with them")
    (head,) = [line for line in lines if line.endswith("r per layer")]
    assert head.split("  ")[-2:] == ["lowest", "r per layer"]
    ran = run(*tune, "--min-similarity", "1", "--force")
    assert ran.code == 3
    assert ran.error.startswith(
        "no schedule was found for the target, similarity of at least 1; the"
    )
    assert " (unmerged 1.0000): " in ran.error


def test_neighbours_are_kept(run, folder, tmp_path):
    tune = ("tune", "own_tower:make", "--data", folder, "--limit", "64")
    ran = run(*tune, "--min-similarity", "0.5", "--measure", "retrieval")
    assert ran.code == 0, ran.err
    found = read_search(tmp_path / "schedule.json")
    assert found.objective.metric == "retrieval"
    assert found.objective.text == "the nearest neighbour kept for at least 50 % of the images"
    assert 0.5 <= found.found.accuracy == found.found.correct / 64 < 1
    assert found.unmerged.accuracy is None
    assert found.found.similarity.mean == pytest.approx(1 - found.found.damage)
    assert found.found.estimate.best_constant.images == 32
    (line,) = [line for line in ran.out.splitlines() if line.startswith("Same neighbour")]
    assert "unmerged" not in line


@pytest.mark.parametrize(
    ("target", "code", "message"),
    [
        (
            ("--min-accuracy", "-1"),
            2,
            "own_tower:make gives features, which are neither right nor wrong; give "
            "--min-similarity, such as 0.98, in place of --min-accuracy",
        ),
        (
            ("--min-similarity", "0.9", "--measure", "retrieval"),
            2,
            "--measure retrieval looks for nearest neighbours, and the samples are six "
            "photographs and their mirror images; give images of yours with --data",
        ),
    ],
)
def test_what_does_not_fit_a_tower(run, tmp_path, target, code, message):
    ran = run("tune", "own_tower:make", *target)
    assert (ran.code, ran.error, ran.out) == (code, message, "")
    assert list(tmp_path.iterdir()) == []
