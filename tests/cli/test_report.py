"""``tome-export report``: what it prints, writes and refuses."""

from __future__ import annotations

import json
import os

import pytest

from tome_export.artifact import Artifact
from tome_export.models.facts import DATA


def test_it_goes_into_the_artifact(run, artifact):
    ran = run("report", artifact, DATA / "digit.png", "--samples", "1")
    assert ran.code == 0, ran.err
    assert ran.err == "Verify the artifact\nFind the merged tokens\nWrite the page\n"
    assert ran.out.splitlines()[:-1] == [
        "Not in it yet: Latency and throughput; tome-export bench artifact",
        "Not in it yet: Accuracy; tome-export eval artifact --data FOLDER",
        "Not in it yet: Pareto front; tome-export tune vit_digits",
    ]
    assert ran.out.splitlines()[-1].startswith(f"Report: {artifact / 'report.html'}, ")
    text = (artifact / "report.html").read_text()
    assert "digit.png" in text
    before = Artifact.open(artifact).manifest.files["report.html"]
    assert run("report", artifact, DATA / "digit.png", "--samples", "1").code == 0
    assert Artifact.open(artifact).manifest.files["report.html"] == before


def test_elsewhere_it_leaves_the_artifact_as_it_is(run, artifact, tmp_path):
    before = (artifact / "build.json").read_bytes()
    found = run("report", artifact, "-o", "page.html", "--json").json
    assert found["report"] == str(tmp_path / "page.html")
    assert found["bytes"] == (tmp_path / "page.html").stat().st_size
    assert len(found["pictures"]) == 4
    assert found["note"] is None
    assert found["random_weights"] is False
    assert (artifact / "build.json").read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["artifact", "page.html"]


def test_random_weights_are_said(run, built_random):
    ran = run("report", built_random, "-o", "page.html", "--samples", "0")
    assert ran.out.startswith("RANDOM WEIGHTS: ")


BAD = {
    "negative": (("--samples", "-1"), 2, "samples are -1; expected 0 or more"),
    "too many": (
        ("--samples", "13"),
        2,
        "13 images were asked for; a page shows at most 12, give fewer or lower --samples",
    ),
    "no such image": (
        ("none.png",),
        3,
        "image none.png does not exist; expected an image file",
    ),
    "a folder": (
        ("-o", "."),
        3,
        ". is a folder; give a file for the page, such as report.html",
    ),
    "no such folder": (
        ("-o", "none/page.html"),
        3,
        "none does not exist; make it, or give another file",
    ),
    "over the model": (
        ("-o", "artifact/model.onnx"),
        3,
        "artifact/model.onnx is inside the artifact, where the page is called report.html; leave "
        "out --output, or give a file elsewhere",
    ),
}


@pytest.mark.parametrize(("options", "code", "message"), BAD.values(), ids=BAD)
def test_what_is_refused(run, artifact, options, code, message):
    before = (artifact / "model.onnx").read_bytes()
    ran = run("report", artifact, *options)
    assert (ran.code, ran.error) == (code, message)
    assert (artifact / "model.onnx").read_bytes() == before
    assert not (artifact / "report.html").exists()


def test_a_report_that_cannot_be_read_is_one_line(run, artifact):
    Artifact.open(artifact).record("bench.json", b'{"latency_ms": {"ort-cpu": 1}}')
    ran = run("report", artifact, "--json")
    assert ran.code == 3
    file = artifact / "bench.json"
    assert ran.json["error"]["message"] == (
        f"{file} has no environment; run 'tome-export bench' of this version again"
    )
    assert json.loads((artifact / "build.json").read_text())["files"].keys() == {
        "bench.json",
        "model.onnx",
        "parity.json",
    }


def test_a_result_that_was_changed_is_left_out(run, artifact):
    Artifact.open(artifact).record("bench.json", b"{}")
    (artifact / "bench.json").write_text("[]")
    (artifact / "parity.json").unlink()
    ran = run("report", artifact, "--samples", "0")
    assert ran.code == 0, ran.err
    changed = [
        "parity.json is gone since it was recorded: run 'tome-export check' again",
        "bench.json was changed after it was recorded: run 'tome-export bench' again",
    ]
    assert ran.out.splitlines()[4:6] == changed
    assert run("report", artifact, "--samples", "0", "--json").json["changed"] == changed


def test_a_schedule_written_by_hand_is_not_tuned(run, tmp_path):
    schedule = {"format": 1, "model": "vit_digits", "schedule": [8, 4, 0, 0, 0, 0]}
    (tmp_path / "mine.json").write_text(json.dumps(schedule))
    build = ("build", "vit_digits", "--engine", "none", "--no-check")
    assert run(*build, "--schedule", "mine.json", "-o", "out").code == 0
    ran = run("report", "out", "--samples", "0")
    assert ran.code == 0, ran.err
    assert "Not in it yet: Pareto front; tome-export tune vit_digits" in ran.out.splitlines()


def test_the_page_of_an_evaluation_without_labels(run, artifact, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "mine").mkdir()
    os.link(DATA / "digit.png", os.fsencode(tmp_path / "mine") + b"/odd\xff.png")
    (tmp_path / "mine" / "bad\udcfe.png").write_bytes(b"none")
    data = ("--data", "mine", "--workers", "0", "--against", "unmerged")
    ran = run("eval", artifact, *data)
    assert ran.code == 0, ran.err
    (entry,) = run("eval", artifact, *data, "--json").json["data"]["unreadable"]
    assert f"  {entry['name']}: {entry['reason']}" in ran.out
    ran = run("report", artifact, "mine/odd\udcff.png", "--samples", "0")
    assert ran.code == 0, ran.err
    page = (artifact / "report.html").read_text(encoding="utf-8")
    assert "As the unmerged model" in page
    assert entry["name"] in page
    assert "odd\\udcff.png after layer 5" in page
    ran = run("inspect", artifact, "mine/odd\udcff.png")
    assert ran.code == 0, ran.err
    assert "odd\\udcff-layer05.png" in ran.out
    summary = json.loads((tmp_path / "artifact-inspect" / "inspect.json").read_text())
    assert summary["pictures"][0]["image"].endswith("odd\udcff.png")
    found = run("inspect", artifact, "mine/odd\udcff.png", "--force", "--json").json
    assert found["pictures"] == summary["pictures"]


def test_serve_tells_of_a_measurement_that_was_changed(run, artifact):
    pytest.importorskip("tritonclient.grpc", reason="the serve extra is not installed")
    Artifact.open(artifact).record("bench.json", b"{}")
    (artifact / "bench.json").write_text("[]")
    why = "bench.json was changed after it was recorded: run 'tome-export bench' again"
    found = run("serve", artifact, "--repository", "models", "--json").json
    attention, *others = found["notes"]
    assert attention.startswith("The ONNX model has fused attention: ")
    assert others == [f"{artifact}: {why}"]
